"""LSTM and GRU, taken apart: the same function, quantized weights, every form of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.graph import clone
from inc_graph.quantization import DynamicQuantConfig, RTNConfig, load, quantize, save
from inc_graph.recipe import set_recipe
from inc_graph.recurrent import GRU_STEPS, LSTM_STEPS
from inc_graph.verify import verify
from tests.golden_check import check_golden
from tests.passes.pipelines import captured, name, recipe, run, text
from tests.passes.test_dynamic import TOKENS as PLAN

TOKENS = {"act_granularity": "per_token", "w_granularity": "per_channel"}


class Net(nn.Module):
    """A recurrent layer, with all of its results; with a first state if `given`."""

    def __init__(self, layer: nn.Module, given: bool = False) -> None:
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x: Tensor, h: Tensor) -> Any:
        state = ((h, h + 1) if isinstance(self.layer, nn.LSTM) else h) if self.given else None
        out, last = self.layer(x, state)
        return out, last


def net(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    layer = kind(6, 5, **options)
    states = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    return Net(layer, given=True).eval(), (torch.randn(4, 3, 6), torch.randn(states, 4 if layer.batch_first else 3, 5))


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


OPTIONS = (
    {},
    {"bias": False},
    {"batch_first": True, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_function(kind: type[nn.Module], options: dict[str, Any]) -> None:
    model, inputs = net(kind, **options)
    gm = captured(model, *inputs)
    set_recipe(gm, recipe(everything=PLAN))
    split = run(clone(gm), "split-recurrent").graph
    verify(split, "float")
    targets = [n.target for n in split.graph.nodes]
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    assert sum(t in (LSTM_STEPS, GRU_STEPS) for t in targets) == layers and "aten.lstm" not in str(targets)
    for a, b, c in zip(flat(split(*inputs)), flat(gm(*inputs)), flat(model(*inputs)), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_quantized(kind: type[nn.Module], tmp_path: Path) -> None:
    model, inputs = net(kind, num_layers=2, bidirectional=True)
    batch = torch.export.Dim("batch", min=2, max=50)
    exported = export(model, inputs, dynamic_shapes=({1: batch}, {1: batch}))
    q = quantize(exported, DynamicQuantConfig(**TOKENS))
    name = "lstm_steps" if kind is nn.LSTM else "gru_steps"
    assert q.report.count(name) == q.report.count("linear") == 4 and not q.report.reference
    assert {line.module for line in q.report.kernels} == {"layer"} and not [
        x for x in q.report.floats if x.op not in ("cat", "add")
    ]
    for rows in (2, 3, 20):  # more than the compiled kernel of few rows takes
        x, h = torch.randn(4, rows, 6), torch.randn(4, rows, 5)
        for a, b, c in zip(flat(q(x, h)), flat(q.graph(x, h)), flat(model(x, h)), strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm() and (a - c).norm() <= 0.03 * c.norm()
    save(q, tmp_path / "q")
    assert all(map(torch.equal, flat(load(tmp_path / "q")(x, h)), flat(q(x, h))))
    with torch.no_grad():
        compiled = torch.compile(q)
        for a, b in zip(flat(compiled(x, h)), flat(q(x, h)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_closer_than_torchs_own() -> None:
    """Differential: `quantize_dynamic` rounds the state at each step and shares ranges among sequences; its error is
    of the same kind."""
    _, (x, _) = net(nn.LSTM)
    model, inputs = Net(nn.LSTM(6, 5)).eval(), (x, x)
    theirs = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    ours = quantize(export(model, inputs), DynamicQuantConfig(**TOKENS))
    want, a, b = model(*inputs)[0], ours(*inputs)[0], theirs(*inputs)[0]
    assert (a - want).norm() <= (b - want).norm() <= 0.05 * want.norm()


def test_what_stays_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.LSTM(4, 4), nn.LSTM(4, 4, proj_size=2), nn.GRU(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)[0])[0])[0]

    gm = captured(Two(), torch.randn(3, 2, 4))
    texts = []
    for plan in (recipe(name("a", None), everything=PLAN), recipe(), recipe(everything=PLAN, supported=("linear",))):
        work = clone(gm)
        set_recipe(work, plan)
        texts.append(str(run(work, "split-recurrent").reports[0]))
    check_golden("split-recurrent/rejected.txt", "\n".join(texts))


def test_golden() -> None:
    model, inputs = net(nn.LSTM)
    gm = captured(model, *inputs)
    set_recipe(gm, recipe(everything=PLAN))
    check_golden("split-recurrent/positive.txt", text(run(gm, "split-recurrent")))


def test_a_rule_for_lstm_speaks_of_its_parts() -> None:
    """By type, by name; and a weight-only method leaves it whole."""
    model, inputs = net(nn.LSTM)
    both = nn.Sequential(nn.Linear(6, 6), model.layer)
    exported = export(both.eval(), (inputs[0],))
    floats = DynamicQuantConfig(w_dtype="fp32")
    for key in (nn.LSTM, "1"):
        q = quantize(exported, DynamicQuantConfig(**TOKENS).set_local(key, floats))
        assert q.report.count("lstm_steps") == 0 and q.report.count("linear") == 1
    q = quantize(exported, RTNConfig(group_size=-1))
    assert [line.op for line in q.report.floats if line.op == "lstm"] == ["lstm"]
