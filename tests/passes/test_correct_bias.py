"""The bias takes back the mean error of the quantized weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.calibrate import Observer
from inc_graph.graph import clone, get_attr, get_tensor, inc_meta, peek_meta
from inc_graph.input_mean import MeanObserver
from inc_graph.spec import PerChannel, PerTensor, QSpec
from tests.golden_check import check_golden
from tests.passes.pipelines import (
    CORRECTED,
    INT8,
    bits,
    find,
    find_one,
    float_twin,
    observe,
    quantize,
    recipe,
    run,
    text,
)

INT4 = replace(CORRECTED, weight=QSpec("int4", "symmetric", PerChannel(0)))  # coarse: errors worth a correction
WEIGHTS_COARSE = replace(INT4, activation=QSpec("int16", "symmetric"))  # the weight's error alone


def data(*shape: int, batches: int = 4) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(*shape, generator=generator) + 1,) for _ in range(batches)]


def mean_error(model: nn.Module, batches: list[tuple[Tensor]], what: Any, **kwargs: Any) -> Tensor:
    """|mean of (quantized - float) output| of each channel (dimension 1), over the calibration data."""
    q = quantize(model, *batches[0], plan=recipe(everything=what), data=batches, **kwargs)
    twin = float_twin(model, *batches[0], **kwargs)
    with torch.no_grad():
        difference = torch.cat([q(*b) - twin(*b) for b in batches])
    return difference.mean([d for d in range(difference.ndim) if d != 1]).abs()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


class RunTimeBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, x[0])


def test_golden() -> None:
    torch.manual_seed(0)
    gm = observe(Two(), torch.randn(1, 3, 4, 4), plan=recipe(everything=CORRECTED))
    gm(torch.randn(1, 3, 4, 4))
    check_golden("correct-bias/positive.txt", text(run(gm, "correct-bias")))


def test_golden_rejected() -> None:
    torch.manual_seed(0)
    gm = observe(RunTimeBias(), torch.randn(4, 4), plan=recipe(everything=CORRECTED))
    gm(torch.randn(4, 4))
    check_golden("correct-bias/rejected.txt", text(run(gm, "correct-bias")))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),  # the border sees fewer taps
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False), (2, 4, 6, 6)),
        (nn.Conv2d(4, 4, (2, 3), padding="same"), (2, 4, 5, 5)),
        (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 3)),
        (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 1, 1)),  # a map of one pixel is known, border and all
        (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 4)),
        (nn.ConvTranspose1d(3, 4, 2, bias=False), (2, 3, 5)),
        (nn.Linear(6, 4), (8, 6)),
        (nn.Linear(6, 4, bias=False), (8, 6)),
    ],
)
def test_the_mean_error_goes(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """The layer is linear, so what is left of the mean error is that of the 16-bit inputs and of float32."""
    torch.manual_seed(0)
    batches = data(*shape)
    before = mean_error(layer, batches, replace(WEIGHTS_COARSE, bias_correction=False))
    after = mean_error(layer, batches, WEIGHTS_COARSE)
    assert before.max() > 1e-3 and after.max() < 1e-4


def test_rows_of_a_sequence() -> None:
    torch.manual_seed(0)
    q = quantize(nn.Linear(6, 4), *data(2, 5, 6)[0], plan=recipe(everything=WEIGHTS_COARSE), data=data(2, 5, 6))
    layer = q.get_buffer(find_one(q, "linear").args[2].target)
    assert layer.shape == (4,) and find_one(q, "linear").args[2].target == "weight_bias_corrected"


def test_maps_of_several_sizes() -> None:
    """The mean map is then unknown; its mean value still takes most of the error back."""
    torch.manual_seed(0)
    layer, dynamic = nn.Conv2d(3, 4, 3, padding=1), {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    batches = data(2, 3, 24, 24)[:2] + data(2, 3, 32, 20)[:2]
    errors = []
    for what in (replace(WEIGHTS_COARSE, bias_correction=False), WEIGHTS_COARSE):
        q = quantize(layer, *batches[0], plan=recipe(everything=what), data=batches, dynamic=(dynamic,))
        with torch.no_grad():
            errors.append(torch.stack([(q(*b) - layer(*b)).mean((0, 2, 3)) for b in batches]).mean(0).abs().max())
    assert errors[1] < 0.3 * errors[0]


def test_the_users_bias_stays() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    unchanged = bits(model)
    quantize(model, *data(1, 3, 4, 4)[0], plan=recipe(everything=INT4), data=data(1, 3, 4, 4))
    assert unchanged()


def test_tied_layers_get_biases_of_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.fc(x)) + 3)

    torch.manual_seed(0)
    q = quantize(Tied(), *data(8, 4)[0], plan=recipe(everything=INT4), data=data(8, 4))
    first, second = find(q, "linear")
    assert first.args[1] is second.args[1] and first.args[2].target != second.args[2].target


def test_no_trace_is_left() -> None:
    gm = observe(Two(), torch.randn(1, 3, 4, 4), plan=recipe(everything=CORRECTED))
    gm(torch.randn(1, 3, 4, 4))
    run(gm, "correct-bias")
    kinds = {type(get_attr(gm, n.target)) for n in gm.graph.find_nodes(op="call_module")}
    assert kinds == {Observer} and not any(isinstance(m, MeanObserver) for m in gm.modules())
    q = run(clone(gm), "convert-qdq").graph
    assert not any("mean" in peek_meta(n).get("weight", {}) for n in q.graph.nodes)


def test_without_mean_observers_nothing_happens() -> None:
    gm = observe(Two(), torch.randn(1, 3, 4, 4))
    result = run(gm, "correct-bias")
    assert not result.reports[0].matched


def test_half_precision_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).to(torch.bfloat16)
    x = torch.randn(8, 6, dtype=torch.bfloat16)
    q = quantize(layer, x, plan=recipe(everything=INT4))
    assert get_tensor(q, find_one(q, "linear").args[2]).dtype == q(x).dtype == torch.bfloat16


def test_asymmetric_and_per_tensor_weights() -> None:
    torch.manual_seed(0)
    for weight in (QSpec("uint4", "asymmetric", PerChannel(0)), QSpec("int4", "symmetric", PerTensor())):
        after = mean_error(nn.Linear(6, 4), data(8, 6), replace(WEIGHTS_COARSE, weight=weight))
        assert after.max() < 1e-4


def test_fuel(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = observe(Two(), torch.randn(1, 3, 4, 4), plan=recipe(everything=CORRECTED))
    gm(torch.randn(1, 3, 4, 4))
    monkeypatch.setenv("INC_FUEL", "1")
    assert run(gm, "correct-bias").reports[0].matched == ["conv2d"]


def test_embeddings_have_no_bias() -> None:
    gm: fx.GraphModule = observe(nn.Embedding(5, 4), torch.tensor([1, 2]), plan=recipe(everything=INT4))
    assert "correct_bias" not in inc_meta(find_one(gm, "embedding"))["weight"]
    assert INT8.bias_correction is False
