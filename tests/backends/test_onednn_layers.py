"""Every form of an int8 layer against the reference: dequantize -> aten operator -> quantize.

A kernel sums exactly in int32 and scales in float32, the reference sums in float32: results may differ by rounding, so
by one quantization step in few places, and by 1e-4 where the output is float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from inc_graph.errors import LoweringError
from inc_graph.lowering._onednn import Activation, Int8Layer, Other
from inc_graph.lowering._packed import Geometry, PackedWeight
from inc_graph.qtypes import get_qtype
from tests.backends.qdq import Builder, Params, assert_close, calls, layers, lower, run_both

aten = torch.ops.aten

CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
CONV_WORDS = {1: aten.conv1d.padding, 2: aten.conv2d.padding, 3: aten.conv3d.padding}
TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}

Act = Callable[[Builder, fx.Node], fx.Node]
FUSED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "relu": (aten.relu.default, ()),
    "relu6": (aten.relu6.default, ()),
    "hardtanh": (aten.hardtanh.default, (-0.75, 1.25)),
    "clamp": (aten.clamp.default, (-0.5, 2.0)),
    "clamp_min_0": (aten.clamp.default, (0,)),
    "hardswish": (aten.hardswish.default, ()),
    "silu": (aten.silu.default, ()),
}
FUSED_LINEAR = FUSED | {
    "gelu": (aten.gelu.default, ()),
    "tanh": (aten.tanh.default, ()),
    "leaky_relu": (aten.leaky_relu.default, (0.125,)),
}
UNFUSED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sigmoid": (aten.sigmoid.default, ()),
    "elu": (aten.elu.default, ()),
    "hardsigmoid": (aten.hardsigmoid.default, ()),
    "clamp_max": (aten.clamp.default, (None, 1.0)),
    "clamp_min": (aten.clamp.default, (-0.25,)),
}
P = Params(0.02, 100)
SCALES = st.sampled_from([0.0039, 0.02, 0.11, 1.7])


@dataclass(frozen=True)
class Case:
    """One layer. `make(builder, x, weight, bias)` writes the operator; `x` and `weight` are their real values."""

    x: Tensor
    weight: Tensor
    make: Callable[[Builder, fx.Node, fx.Node, fx.Node | None], fx.Node]
    axis: int = 0
    bias: bool = True
    params: Params = P
    w_type: str = "int8"
    per_tensor: bool = False
    activation: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    out: str | None = "uint8"
    source: Callable[[Builder, fx.Node], fx.Node] = lambda b, x: x  # between the input's dequantize and the operator

    def build(self, out: Params | None) -> fx.GraphModule:
        b = Builder()
        x = self.source(b, b.act(b.input(self.x), self.params))
        block = [-1] * self.weight.ndim
        if not self.per_tensor:
            block[self.axis] = 1
        w = b.weight(self.weight, self.w_type, block)
        bias = torch.linspace(-1, 1, self.weight.shape[self.axis]).to(self.x.dtype) if self.bias else None
        y = self.make(b, x, w, None if bias is None else b.const(bias, "bias"))
        if self.activation is not None:
            target, args, kwargs = self.activation
            y = b.call(target, y, *args, **kwargs)
        return b.done(y if out is None else b.act(y, out))

    def check(self, name: str) -> Any:
        """Lower, count the kernel, compare. Returns what lowering gave.

        Codes may differ from the reference's where the value lies half-way between two of them, up to the float32 error
        of what is fused: each has to be a nearest code of the value before it was rounded.
        """
        out = None
        (exact,) = self.build(None)(self.x)
        if self.out is not None:
            out = Params.of(exact.float() if exact.numel() else torch.zeros(1), self.out)
        gm = self.build(out)
        lowered = lower(gm)
        assert lowered.report.claimed[name] == 1 and not lowered.report.missed, str(lowered.report)
        assert "int8_layer" in calls(lowered)
        ((expected, got),) = run_both(gm, lowered, self.x)
        assert_close(expected, got, out and out.scale, equal=0)
        if out is not None and got.numel():
            qtype = get_qtype(out.qtype)
            ends = [(end - out.zero_point) * out.scale for end in (qtype.qmin, qtype.qmax)]
            off = (got.double() - exact.double().clamp(*ends)).abs().max()
            tie = {torch.float32: 0.501, torch.float64: 0.501}.get(self.x.dtype, 1.0)  # half types are rounded twice
            assert off <= tie * out.scale + 1e-4 * exact.abs().max(), (
                f"{off / out.scale:.3f} steps from the exact value"
            )
        ((attr, codes),) = lowered.packed.items()
        assert torch.equal(codes(), getattr(gm, attr)) and codes().is_contiguous()
        return lowered


def random_weight(*shape: int, seed: int = 1) -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    fan = max(1, w[0].numel())
    return w / fan**0.5


def activations(table: dict[str, Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from([None, *((op, args, {}) for op, args in table.values())])


params = st.builds(Params, SCALES, st.integers(0, 255), st.just("uint8")) | st.builds(
    Params, SCALES, st.integers(-128, 127), st.just("int8")
)


# ------------------------------------------------------------------------------------------------------------ linear
def linear(b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node | None) -> fx.Node:
    return b.call(aten.linear.default, x, w, bias)


@st.composite
def linears(draw: st.DrawFn) -> Case:
    inner, outer = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    p = draw(params)
    activation = draw(activations(FUSED_LINEAR))
    if activation is not None and activation[0] is aten.gelu.default:
        activation = (*activation[:2], {"approximate": draw(st.sampled_from(["none", "tanh"]))})
    return Case(
        x=p.values(*lead, inner, seed=draw(st.integers(0, 99))),
        weight=random_weight(outer, inner) / p.scale / 100,
        make=linear,
        bias=draw(st.booleans()),
        params=p,
        w_type=draw(st.sampled_from(["int8", "int7"])),
        per_tensor=draw(st.booleans()),
        activation=activation,
        out=draw(st.sampled_from(["uint8", "int8", None])),
    )


@settings(max_examples=60)
@given(linears())
def test_linear(case: Case) -> None:
    case.check("int8 linear")


@pytest.mark.parametrize("variant", ["none", "tanh"])
def test_gelu_is_exact_enough_over_its_whole_range(variant: str) -> None:
    p = Params(0.05, 128)
    x = torch.arange(256)[:, None].sub(128).mul(0.05)  # every code once
    act = (aten.gelu.default, (), {"approximate": variant})
    lowered = Case(x, torch.ones(1, 1), linear, params=p, out=None, bias=False, activation=act).check("int8 linear")
    assert layers(lowered)[0].activation == Activation("gelu", (), variant)


# ------------------------------------------------------------------------------------------------------ convolutions
@dataclass(frozen=True)
class Conv:
    """`conv{dims}d` with numbers of length 1 or `dims`."""

    dims: int
    stride: Sequence[int] = (1,)
    padding: Sequence[int] = (0,)
    dilation: Sequence[int] = (1,)
    groups: int = 1

    def __call__(self, b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node | None) -> fx.Node:
        numbers = map(list, (self.stride, self.padding, self.dilation))
        return b.call(CONV[self.dims], x, w, bias, *numbers, self.groups)


@st.composite
def convolutions(draw: st.DrawFn, dims: int) -> Case:
    kind = draw(st.sampled_from(["plain", "depthwise", "grouped"]))
    groups = 1 if kind == "plain" else draw(st.integers(2, 12))
    inner = 1 if kind == "depthwise" else draw(st.integers(1, 9))
    outer = draw(st.integers(1, 3 if kind != "plain" else 20)) * groups
    numbers = st.lists(st.integers(1, 3), min_size=dims, max_size=dims)
    kernel, stride, dilation = draw(numbers), draw(numbers), draw(numbers)
    padding = [draw(st.integers(0, 2)) for _ in range(dims)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    space = [max(1, r - 2 * q) + draw(st.integers(0, 5)) for r, q in zip(reach, padding, strict=True)]
    p = draw(params)
    return Case(
        x=p.values(draw(st.integers(0, 3)), inner * groups, *space, seed=draw(st.integers(0, 99))),
        weight=random_weight(outer, inner, *kernel) / p.scale / 100,
        make=Conv(dims, stride=stride, padding=padding, dilation=dilation, groups=groups),
        bias=draw(st.booleans()),
        params=p,
        w_type=draw(st.sampled_from(["int8", "int7"])),
        per_tensor=draw(st.booleans()),
        activation=draw(activations(FUSED)),
        out=draw(st.sampled_from(["uint8", "int8", None])),
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution(dims: int) -> None:
    @settings(max_examples=40)
    @given(convolutions(dims))
    def check(case: Case) -> None:
        case.check("int8 convolution")

    check()


@settings(max_examples=40)
@given(st.data())
def test_padding_that_differs_from_side_to_side_is_a_larger_kernel(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    numbers = st.lists(st.integers(0, 2), min_size=2 * dims, max_size=2 * dims)
    widths, own = data.draw(numbers), [data.draw(st.integers(0, 1)) for _ in range(dims)]
    stride = [data.draw(st.integers(1, 2)) for _ in range(dims)]
    dilation = [data.draw(st.integers(1, 2)) for _ in range(dims)]
    depthwise = data.draw(st.booleans())
    p = data.draw(params)

    def padded(b: Builder, x: fx.Node) -> fx.Node:
        return b.act(b.call(aten.pad.default, x, widths), p)

    case = Case(
        x=p.values(2, 4, *[5] * dims),
        weight=random_weight(4, 1 if depthwise else 4, *[3] * dims) / p.scale / 100,
        make=Conv(dims, stride=stride, padding=own, dilation=dilation, groups=4 if depthwise else 1),
        params=p,
        source=padded,
    )
    lowered = case.check("int8 convolution")
    uneven = [a - b for a, b in zip(widths[::2], widths[1::2], strict=True)]
    if not any(u % d for u, d in zip(uneven, dilation[::-1], strict=True)):
        assert "aten.pad.default" not in calls(lowered)


# Each of these wrote wrong values or beyond its memory when it was handed to oneDNN as it is (torch 2.13, AVX512-VNNI).
TROUBLE: dict[str, tuple[tuple[int, ...], tuple[int, ...], Conv]] = {
    "padding as wide as the kernel": ((2, 6, 5, 1), (12, 1, 2, 1), Conv(2, (1, 3), (2, 1), (1, 2), 6)),
    "a dilated window around the input": ((3, 5, 5, 1), (5, 5, 2, 2), Conv(2, (3, 3), (2, 1), (1, 2))),
    "no window sees the input": ((1, 15, 3, 1), (3, 5, 1, 1), Conv(2, (3, 2), (1, 1), (2, 2), 3)),
    "two outputs a channel": ((3, 8, 8, 6), (16, 1, 1, 5), Conv(2, (1, 3), (0, 0), (1, 1), 8)),
    "three outputs a channel, 1-d": ((1, 3, 6), (6, 1, 3), Conv(1, (2,), (0,), (1,), 3)),
    "eight outputs a channel": ((2, 16, 1, 3), (128, 1, 2, 1), Conv(2, (2, 1), (2, 1), (1, 1), 16)),
    "depthwise, 3-d": ((1, 2, 5, 2, 3), (2, 1, 2, 1, 5), Conv(3, (1, 3, 2), (0, 0, 2), (1, 3, 1), 2)),
    "depthwise, 3-d, 16 groups": ((2, 16, 2, 12, 12), (16, 1, 3, 5, 3), Conv(3, (2, 4, 2), (1, 0, 0), (1, 1, 2), 16)),
    "one channel, stride [1, 4]": ((3, 1, 14, 4), (3, 1, 2, 7), Conv(2, (1, 4), (0, 3), (1, 1))),
    "one channel, 3-d": ((2, 1, 1, 3, 10), (8, 1, 5, 2, 7), Conv(3, (2, 4, 4), (2, 2, 0), (1, 2, 1))),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_forms_that_the_kernels_get_wrong_are_given_to_them_as_equal_forms(name: str) -> None:
    shape, weight, make = TROUBLE[name]
    for out in ("uint8", None):
        Case(P.values(*shape), random_weight(*weight), make, out=out).check("int8 convolution")


def test_too_many_groups_to_merge_are_reported() -> None:
    b = Builder()
    x = P.values(1, 17, 4, 4, 4)
    make = Conv(3, groups=17)
    gm = b.done(make(b, b.act(b.input(x), P), b.weight(random_weight(17, 1, 1, 1, 1)), None))
    lowered = lower(gm)
    ((_, reason),) = lowered.report.missed.values()
    assert reason.startswith("a depthwise convolution of a kind that oneDNN's kernels get wrong")
    assert torch.equal(*run_both(gm, lowered, x)[0])


def test_a_kernel_that_would_grow_too_much_keeps_its_pad() -> None:
    p = Params(0.02, 7)
    case = Case(
        x=p.values(1, 2, 6, 6),
        weight=random_weight(3, 2, 3, 3),
        make=Conv(2),
        params=p,
        source=lambda b, x: b.act(b.call(aten.pad.default, x, [5, 0, 0, 0]), p),
    )
    assert "aten.pad.default" in calls(case.check("int8 convolution"))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("word", ["same", "valid"])
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (3, 2), (2, 1), (4, 1), (2, 3)])
def test_padding_in_words(dims: int, word: str, kernel: int, dilation: int) -> None:
    def make(b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node | None) -> fx.Node:
        return b.call(CONV_WORDS[dims], x, w, bias, [1] * dims, word, [dilation] * dims, 1)

    p = Params(0.02, 90)
    Case(p.values(2, 3, *[9] * dims), random_weight(4, 3, *[kernel] * dims), make, params=p).check("int8 convolution")


@st.composite
def transposed(draw: st.DrawFn) -> Case:
    dims = draw(st.integers(1, 3))
    per = lambda low, high: [draw(st.integers(low, high)) for _ in range(dims)]  # noqa: E731
    kernel, stride, dilation, padding = per(1, 3), per(1, 3), per(1, 2), per(0, 3)
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    terms = zip(kernel, stride, dilation, padding, extra, strict=True)
    least = [-(-(2 * q - d * (k - 1) - e) // s) + 1 for k, s, d, q, e in terms]  # smallest input with an output
    space = [max(1, n) + draw(st.integers(0, 3)) for n in least]
    inner, outer = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    p = draw(params)

    def make(b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node | None) -> fx.Node:
        return b.call(TRANSPOSED[dims], x, w, bias, stride, padding, extra, 1, dilation)

    return Case(
        x=p.values(draw(st.integers(0, 2)), inner, *space),
        weight=random_weight(inner, outer, *kernel) / p.scale / 100,
        make=make,
        axis=1,
        bias=draw(st.booleans()),
        params=p,
        per_tensor=draw(st.booleans()),
        activation=draw(activations(FUSED)),
        out=draw(st.sampled_from(["uint8", "int8", None])),
    )


@settings(max_examples=40)
@given(transposed())
def test_transposed_convolution(case: Case) -> None:
    case.check("int8 transposed convolution")


# ----------------------------------------------------------------------------------------------------- what is fused
def simple(kind: str, **more: Any) -> Case:
    """A small layer of a kind ("linear" or "conv")."""
    p = more.pop("params", Params(0.02, 100))
    shape, weight, make = ((6, 24), (16, 24), linear) if kind == "linear" else ((2, 8, 6, 6), (16, 8, 3, 3), Conv(2))
    return Case(x=p.values(*shape), weight=2 * random_weight(*weight), make=make, params=p, **more)


NAMES = {"linear": "int8 linear", "conv": "int8 convolution"}


@pytest.mark.parametrize(
    "kind, name", [("linear", n) for n in FUSED_LINEAR] + [("conv", n) for n in FUSED], ids=lambda v: v
)
@pytest.mark.parametrize("out", ["uint8", "int8", None], ids=str)
def test_activation_is_fused(kind: str, name: str, out: str | None) -> None:
    op, args = FUSED_LINEAR[name]
    lowered = simple(kind, activation=(op, args, {}), out=out).check(NAMES[kind])
    assert not [c for c in calls(lowered) if c.startswith("aten.")]
    if out is None:
        assert layers(lowered)[0].activation.name != "none"


@pytest.mark.parametrize(
    "kind, name",
    [("linear", n) for n in UNFUSED] + [("conv", n) for n in (*UNFUSED, "gelu", "tanh", "leaky_relu")],
    ids=lambda v: v,
)
def test_activation_without_a_fused_form_stays_between_the_kernels(kind: str, name: str) -> None:
    op, args = (UNFUSED | FUSED_LINEAR)[name]
    out = None if op is aten.clamp.default else "uint8"  # before a quantization these bounds may be those of the codes
    lowered = simple(kind, activation=(op, args, {}), out=out).check(NAMES[kind])
    assert calls(lowered)[1:] == ["int8_layer", str(op), "quantize_codes", "dequantize_codes"][: 4 if out else 2]
    assert layers(lowered)[0].output.dtype == torch.float32


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "bounds, zero_point, fused",
    [
        ((0.0, 2.55), 0, "none"),
        ((0.0, 9.0), 0, "none"),
        ((-9.0, 9.0), 40, "none"),
        ((0.0, 3.0), 40, "relu"),
        ((0.0, 1.0), 0, "hardtanh"),
        ((-0.2, 9.0), 40, "hardtanh"),
    ],
)
def test_clipping_that_saturation_does_anyway_is_dropped(
    dims: int, bounds: tuple[float, float], zero_point: int, fused: str
) -> None:
    b, p, out = Builder(), Params(0.02, 100), Params(0.01, zero_point)
    x = p.values(2, 3, *[6] * dims)
    y = Conv(dims)(b, b.act(b.input(x), p), b.weight(random_weight(4, 3, *[3] * dims)), None)
    gm = b.done(b.act(b.call(aten.hardtanh.default, y, *bounds), out))
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, x)
    assert_close(expected, got, out.scale)
    in_kernel = dims < 3 or fused == "none"  # the three-dimensional kernel has no activation functions at all
    assert layers(lowered)[0].activation.name == (fused if in_kernel else "none")
    assert ("aten.hardtanh.default" not in calls(lowered)) == in_kernel


def test_what_somebody_else_reads_is_not_fused() -> None:
    b = Builder()
    p = Params(0.02, 100)
    x = p.values(3, 8)
    y = linear(b, b.act(b.input(x), p), b.weight(random_weight(5, 8)), None)
    z = b.call(aten.relu.default, y)
    gm = b.done(y, b.act(z, Params(0.05, 0)))
    lowered = lower(gm)
    assert "aten.relu.default" in calls(lowered)
    for (expected, got), scale in zip(run_both(gm, lowered, x), (None, 0.05), strict=True):
        assert_close(expected, got, scale)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("reduced", ["uint7", "int7"])
def test_seven_bit_outputs_are_not_written_by_the_kernel(kind: str, reduced: str) -> None:
    """The kernel saturates at the ends of the dtype, a 7-bit type earlier."""
    case = simple(kind, out=reduced, params=Params(0.05, 30, reduced))
    lowered = case.check(NAMES[kind])
    assert layers(lowered)[0].output.dtype == torch.float32
    assert any(c.startswith("inc.quantize") for c in calls(lowered))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("out", ["uint8", None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_float_models(kind: str, out: str | None, dtype: torch.dtype) -> None:
    """Rounding the reference's intermediate values to 8 or 11 bits costs it up to a step more."""
    case = simple(kind, out=out, activation=(aten.relu.default, (), {}))
    case = replace(case, x=case.x.to(dtype), weight=case.weight.to(dtype))
    p = Params.of(case.build(None)(case.x)[0].float()) if out else None
    gm = case.build(p)
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, case.x)
    assert lowered.report.claimed[NAMES[kind]] == 1
    if p is not None:
        assert_close(expected, got, p.scale, steps=1 if dtype == torch.float64 else 2, equal=0.7)
    else:
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


# ----------------------------------------------------------------------------------------- what stays on the reference
def _one(weight: Callable[[Builder], fx.Node], p: Params = P, bias: Any = None) -> fx.GraphModule:
    b = Builder()
    x = b.act(b.input(p.values(3, 32)), p)
    return b.done(linear(b, x, weight(b), bias and bias(b)))


W = random_weight(8, 32)


@pytest.mark.parametrize(
    "weight, reason",
    [
        (lambda b: b.weight(W, scheme="asymmetric"), "asymmetric weights"),
        (lambda b: b.weight(W, block=[1, 8]), "weight block [1, 8]"),
        (lambda b: b.weight(W, "int4"), "weights of type int4"),
        (lambda b: b.weight(W, "uint8"), "weights of type uint8"),
        (lambda b: b.const(W), "weight is not quantized"),
    ],
    ids=["asymmetric", "per group", "int4", "uint8", "float"],
)
def test_a_weight_no_kernel_takes_is_reported(weight: Any, reason: str) -> None:
    gm = _one(weight)
    lowered = lower(gm)
    assert not lowered.report.kernels and not layers(lowered) and not lowered.packed
    ((_, said),) = lowered.report.missed.values()
    assert reason in said
    x = Params(0.02, 100).values(3, 32)
    ((expected, got),) = run_both(gm, lowered, x)
    assert_close(expected, got)


def test_an_input_no_kernel_takes_is_reported() -> None:
    b = Builder()
    x = Params(0.02, 0, "int4").values(3, 32)
    gm = b.done(linear(b, b.act(b.input(x), Params(0.2, 0, "int4")), b.weight(W), None))
    ((_, said),) = lower(gm).report.missed.values()
    assert "int4" in said
    b = Builder()
    gm = b.done(linear(b, b.input(x), b.weight(W), None))
    lowered = lower(gm)  # a float input: the weight alone is quantized, and has kernels of its own
    assert not lowered.report.missed and not lowered.report.reference and "int8 linear" not in lowered.report.claimed


def test_a_computed_bias_and_an_unbatched_convolution_are_reported() -> None:
    gm = _one(lambda b: b.weight(W), bias=lambda b: b.call(aten.neg.default, b.const(torch.ones(8))))
    assert [r for _, r in lower(gm).report.missed.values()] == ["its bias is computed at run time"]
    b = Builder()
    x = b.act(b.input(torch.randn(3, 8, 8)), Params(0.02, 100))
    gm = b.done(Conv(2)(b, x, b.weight(random_weight(4, 3, 3, 3)), None))
    assert [r for _, r in lower(gm).report.missed.values()] == ["unbatched input of rank 3"]


def test_grouped_transposed_convolution_is_reported() -> None:
    b = Builder()
    x = b.act(b.input(torch.randn(1, 4, 8)), Params(0.02, 100))
    w = b.weight(random_weight(4, 3, 3), block=[-1, -1, -1])
    gm = b.done(b.call(TRANSPOSED[1], x, w, None, [1], [0], [0], 2, [1]))
    lowered = lower(gm)
    assert [r for _, r in lowered.report.missed.values()] == ["grouped transposed convolution"]


def test_float_layers_are_nobody_s_business() -> None:
    b = Builder()
    gm = b.done(linear(b, b.input(torch.randn(2, 32)), b.const(W), None))
    lowered = lower(gm)
    assert not lowered.report.missed and not lowered.report.claimed


def test_two_layers_with_one_weight_give_it_back_once() -> None:
    b = Builder()
    p, w = Params(0.02, 100), b.weight(random_weight(8, 8))
    x = p.values(4, 8)
    y = linear(b, b.act(b.input(x), p), w, None)
    gm = b.done(linear(b, b.act(y, Params(0.03, 128)), w, None))
    lowered = lower(gm)
    assert len(layers(lowered)) == 2
    ((attr, codes),) = lowered.packed.items()
    assert torch.equal(codes(), getattr(gm, attr)) and not hasattr(lowered.graph, attr)
    ((expected, got),) = run_both(gm, lowered, x)
    assert_close(expected, got, equal=0)


# ---------------------------------------------------------------------------------------------------- the layer object
def test_combinations_the_kernels_refuse_are_refused_when_the_layer_is_made() -> None:
    one = Geometry((1,) * 3, (0,) * 3, (1,) * 3)
    conv = PackedWeight(torch.ones(4, 4, 1, 1, 1, dtype=torch.int8), torch.ones(4), [1, 4, 3, 3, 3], one)
    with pytest.raises(LoweringError, match=r"conv3d \[4, 4, 1, 1, 1\] \+ sum"):
        Int8Layer(conv, None, 1.0, 0, other=Other("sum"))
    with pytest.raises(LoweringError, match="relu"):
        Int8Layer(conv, None, 1.0, 0, activation=Activation("relu"))
    linear = PackedWeight(torch.ones(4, 4, dtype=torch.int8), torch.ones(4), [2, 4])
    with pytest.raises(LoweringError, match=r"add \+ gelu"):
        Int8Layer(linear, None, 1.0, 0, activation=Activation("gelu"), other=Other("add"))


def test_bytes_are_those_of_the_packed_weight() -> None:
    weight = PackedWeight(torch.ones(64, 64, dtype=torch.int8), torch.ones(64), [8, 64])
    layer = Int8Layer(weight, torch.ones(64), 1.0, 0)
    assert 64 * 64 + 3 * 64 * 4 <= layer.nbytes() <= 64 * 64 + 4 * 64 * 4
    assert Int8Layer(weight, torch.ones(64), 1.0, 0, counted=False).nbytes() == 64 * 4
    geometry = Geometry((1, 1), (0, 0), (1, 1))
    odd = PackedWeight(torch.ones(3, 5, 3, 3, dtype=torch.int8), torch.ones(3), [1, 5, 9, 9], geometry)
    assert Int8Layer(odd, None, 1.0, 0).nbytes() >= 3 * 5 * 9  # oneDNN pads channels to its blocks
