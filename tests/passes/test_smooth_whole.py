"""Alphas of a whole model, by the error of what it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.channel_stats import PARTS, ChannelObserver, Without
from inc_graph.export import export
from inc_graph.passes import _smooth_whole
from inc_graph.passes._smooth_whole import Whole
from inc_graph.quantization import SmoothQuantConfig, convert, prepare
from tests.smooth_models import RMSNorm


class Deep(nn.Module):
    """Norms that make outliers, and layers with small weights for them; counts its calls in a buffer."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(RMSNorm(16) for _ in range(blocks))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(blocks))
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            layer.weight.data /= norm.weight.data ** (0.4 + 0.3 * i)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + F.relu(layer(norm(x)))
        return x + 0 * self.calls


def calls(count: int, rows: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, 16, generator=generator) for _ in range(count)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Whole]:
    """The judges of whole models that come to a decision."""
    found: list[Whole] = []
    descend = _smooth_whole._descend

    def watched(whole: Whole) -> Any:
        found.append(whole)
        return descend(whole)

    monkeypatch.setattr(_smooth_whole, "_descend", watched)
    return found


def quantized(config: SmoothQuantConfig, data: list[Tensor]) -> tuple[Any, Any]:
    graph = export(Deep().eval(), (data[0],))
    prepared: Any = prepare(graph, config, inplace=False)
    with torch.no_grad():
        for x in data:
            prepared(x)
    return graph, convert(prepared, backend="eager")


def test_the_least_error_of_what_the_model_gives_counts(asked: list[Whole]) -> None:
    _, q = quantized(SmoothQuantConfig(alpha="auto"), calls(4))
    (whole,) = asked
    by_layer = {line.layers[0]: line.alpha for line in q.report.smoothing}
    chosen = tuple(by_layer[f"layers.{i}"] for i in range(3) if by_layer[f"layers.{i}"] is not None)
    assert len(chosen) >= 2 and whole.tried[chosen] == min(whole.tried.values())
    own, none, *common = whole.tried
    assert set(none) == {None}
    assert sum(len(set(alphas)) == 1 for alphas in common) >= 4, "one alpha for all, and its neighbours"
    assert len(set(own)) > 1 and max(whole.tried.values()) > min(whole.tried.values())
    assert float(q.state_dict()["calls"]) == 0, "calibration and the search count no calls"


def test_the_error_is_that_of_the_converted_model(asked: list[Whole]) -> None:
    (x,) = data = calls(1, rows=4)  # one call: no range without it
    quantized(SmoothQuantConfig(alpha="auto"), data)
    alphas = next(a for a in asked[0].tried if len(set(a)) == 1 and None not in a)
    graph, q = quantized(SmoothQuantConfig(alpha=alphas[0]), data)
    with torch.no_grad():
        want, got = graph(x), q(x)
    error = float((got - want).square().sum() / want.square().sum())
    assert 0 < error == pytest.approx(asked[0].tried[alphas], rel=0.05)  # biases are corrected, too


def test_limits_of_each_layer_hold(asked: list[Whole]) -> None:
    config = SmoothQuantConfig(alpha="auto").set_local("layers.2", SmoothQuantConfig(alpha="auto", alpha_max=0.2))
    config = config.set_local("layers.1", SmoothQuantConfig(alpha=0.9))
    _, q = quantized(config, calls(4))
    (whole,) = asked
    assert len(whole.tried) > 3 and all(a[1] <= 0.2 for a in whole.tried if None not in a)
    by_layer = {line.layers[0]: line.alpha for line in q.report.smoothing}
    assert by_layer["layers.2"] <= 0.2 and by_layer["layers.1"] == 0.9


def test_nothing_is_scaled_if_that_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Whole, "__call__", lambda self, alphas: self.tried.setdefault(alphas, float(None not in alphas))
    )
    _, q = quantized(SmoothQuantConfig(alpha="auto"), calls(4))
    lines = q.report.smoothing
    assert [(line.by, line.alpha) for line in lines] == [("left", None)] * 3
    assert "no alpha makes the error of the model smaller" in {line.detail for line in lines}


def test_blocks_are_judged_by_their_own(asked: list[Whole]) -> None:
    quantized(SmoothQuantConfig(alpha="auto", do_blockwise=True), calls(4))
    assert not asked


def test_ranges_without_a_part_of_the_calls() -> None:
    observer = ChannelObserver(-1, 0)
    data = [torch.full((1, 2), float(i)) for i in range(PARTS + 2)]
    for x in data:
        observer(x)
    for i in range(PARTS):
        low, high = observer.ranges(Without(i))
        left = [float(x[0, 0]) for j, x in enumerate(data) if j % PARTS != i]
        assert low.tolist() == [min(left)] * 2 and high.tolist() == [max(left)] * 2
    one = ChannelObserver(-1, 0)
    one(data[3])
    assert torch.equal(one.ranges(Without(0))[1], data[3][0]), "there is no other"
