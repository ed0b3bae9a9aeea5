"""Our reference Q-DQ graph against torchao's PT2E flow and torch's own fake quantization, on what those quantize.

Equal bit for bit. Why that can be: both sides compute `round(x * (1 / scale)) + zero` in float32, both dequantize to
float32, and both then call the same aten operators on the same values. Scales agree because both observe minimum and
maximum, widen the range to zero, and divide it by 255; weights by the greatest magnitude over 127.5 (theirs: `(qmax -
qmin) / 2` of -128..127). Theirs have a least scale of 2**-12, ours of 2**-120, which is not met here. torchao's
default, a histogram, finds other ranges: there its scales are copied into our graph first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.graph import get_tensor
from inc_graph.ops import is_quantize
from tests.passes.pipelines import INT8, find, pairs, qparams, quantize, recipe

pytest.importorskip("torchao")
xiq = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
pt2e = pytest.importorskip("torchao.quantization.pt2e")
flow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")

EXACT = replace(INT8, bias_correction=False)  # torchao corrects no bias


class Residual(nn.Module):
    """A convolution whose sum takes the block's input, before and after an activation."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + x
        return self.b(F.relu(y) if self.relu else y)


IMAGE = (2, 4, 7, 7)
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 4), (5, 8)),
    "linear without bias": (lambda: nn.Linear(8, 4, bias=False), (2, 5, 8)),
    "linear, relu, linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (5, 8)),
    "linear, gelu, linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), (5, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), IMAGE),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2, padding=1, bias=False), IMAGE),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), IMAGE),
    "conv2d, relu, conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)), IMAGE),
    "conv2d, relu6, conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 1)), IMAGE),
    "conv2d + add": (lambda: Residual(False), IMAGE),
    "conv2d + add + relu": (lambda: Residual(True), IMAGE),
}


def minmax_config() -> Any:
    """torchao's default config with minimum and maximum instead of a histogram."""
    default = xiq.get_default_x86_inductor_quantization_config()
    observer = pt2e.MinMaxObserver.with_args(eps=2**-12)
    act = replace(default.input_activation, observer_or_fake_quant_ctr=observer)
    return replace(default, input_activation=act, output_activation=act)


def theirs(model: nn.Module, x: Tensor, config: Any, data: list[Tensor]) -> fx.GraphModule:
    quantizer = xiq.X86InductorQuantizer()
    quantizer.set_global(config)
    prepared = flow.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for batch in data:
        prepared(batch)
    return flow.convert_pt2e(prepared)


def their_qparams(gm: fx.GraphModule) -> list[tuple[float, int]]:
    """(scale, zero point) of each activation, in graph order."""
    nodes = [n for n in gm.graph.nodes if "quantized_decomposed.quantize_per_tensor" in str(n.target)]
    return [(float(n.args[1]), int(n.args[2])) for n in nodes]


def our_qparams(gm: fx.GraphModule) -> list[tuple[float, int]]:
    found = [qparams(gm, q) for q, _ in pairs(gm)]
    return [(scale[0], zero[0] if zero else 0) for scale, zero, _ in found]


def set_qparams(gm: fx.GraphModule, params: list[tuple[float, int]]) -> None:
    for (q, _), (scale, zero) in zip(pairs(gm), params, strict=True):
        get_tensor(gm, q.args[1]).fill_(scale)
        get_tensor(gm, q.args[2]).fill_(zero)


def both(case: str, config: Any) -> tuple[fx.GraphModule, fx.GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make().eval()
    data = [torch.randn(shape) * s + 0.5 for s in (1.0, 2.0)]
    with torch.no_grad():
        a = theirs(model, data[0], config, data)
        b = quantize(model, data[0], plan=recipe(everything=EXACT), data=[(x,) for x in data])
    return a, b, [*data, torch.randn(shape) * 5]  # the last one saturates


def compare(a: fx.GraphModule, b: fx.GraphModule, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        for x in inputs:
            assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("case", CASES)
def test_equal_from_the_same_ranges(case: str) -> None:
    """Both sides find the ranges themselves."""
    a, b, inputs = both(case, minmax_config())
    assert our_qparams(b) == their_qparams(a) and len(our_qparams(b)) > 0
    compare(a, b, inputs)


@pytest.mark.parametrize("case", CASES)
def test_equal_with_their_ranges(case: str) -> None:
    """torchao as it comes, whose histogram clips; we take its scales."""
    a, b, inputs = both(case, xiq.get_default_x86_inductor_quantization_config())
    set_qparams(b, their_qparams(a))
    compare(a, b, inputs)


@pytest.mark.parametrize("case", CASES)
def test_weights_equal(case: str) -> None:
    """Codes and scales of weights, bit for bit."""
    a, b, _ = both(case, minmax_config())
    nodes = [n for n in a.graph.nodes if "dequantize_per_channel" in str(n.target)]
    ours = [n.args[1] for n in b.graph.nodes if n in find(b, "conv2d") + find(b, "linear")]
    assert len(nodes) == len(ours)
    for node, dq in zip(nodes, ours, strict=True):
        codes, scale, zero = (get_tensor(a, arg) for arg in node.args[:3])
        assert torch.equal(get_tensor(b, dq.args[0]), codes) and not bool(zero.any()) and dq.args[2] is None
        assert torch.equal(get_tensor(b, dq.args[1]).flatten(), scale.float())


@pytest.mark.parametrize("case", CASES)
def test_as_many_conversions(case: str) -> None:
    """The same values are quantized, each once."""
    a, b, _ = both(case, minmax_config())
    assert len(their_qparams(a)) == sum(is_quantize(n) for n in b.graph.nodes)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_fake_quantization(case: str) -> None:
    """Every activation and weight of the Q-DQ graph against torch.fake_quantize_*, bit for bit."""
    _, b, inputs = both(case, minmax_config())
    seen: dict[fx.Node, Tensor] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    for x in inputs:
        with torch.no_grad():
            Record(b, garbage_collect_values=False).run(x)
        for q, dq in pairs(b):
            (scale,), zero, _ = qparams(b, q)
            want = torch.fake_quantize_per_tensor_affine(seen[q.args[0]], scale, zero[0] if zero else 0, 0, 255)
            assert torch.equal(seen[dq], want)
    torch.manual_seed(0)
    weights = [p.detach() for p in CASES[case][0]().parameters() if p.ndim > 1]
    ours = [n.args[1] for n in b.graph.nodes if n in find(b, "conv2d") + find(b, "linear")]
    for w, dq in zip(weights, ours, strict=True):
        scale = get_tensor(b, dq.args[1]).flatten()
        zero_point = torch.zeros(len(scale), dtype=torch.int32)
        assert torch.equal(seen[dq], torch.fake_quantize_per_channel_affine(w, scale, zero_point, 0, -128, 127))
