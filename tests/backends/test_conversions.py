"""Into codes and back: values of the reference, and the layouts that shape propagation has promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inc_graph import numerics
from inc_graph.lowering import _codes
from inc_graph.lowering._codes import codes_to_unsigned, dequantize_codes, lookup_rows, quantize_codes, spread
from tests.backends.qdq import Builder, Params, assert_close, calls, layers, lower, run_both

aten = torch.ops.aten

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "sliced": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:1, :, :1].expand(3, -1, 2, -1),
    "offset": lambda x: x.flatten()[7:].unflatten(0, (1, -1)),
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0, 0, 0],
    "one entry": lambda x: x[:1, :1, :1, :1],
}
QPARAMS = [Params(0.05, 0), Params(0.03, 77), Params(0.02, 255), Params(0.04, -128, "int8"), Params(0.05, 3, "int8")]


def reference(x: Tensor, p: Params) -> Tensor:
    ones = (1,) * x.ndim
    zero = torch.full(ones, p.zero_point, dtype=torch.int32)
    return numerics.quantize(x, torch.full(ones, p.scale), zero, [-1] * x.ndim, p.qtype)


def strides(x: Tensor) -> list[int]:
    """Those that matter."""
    return [s for n, s in zip(x.shape, x.stride(), strict=True) if n != 1]


def values(p: Params, dtype: torch.dtype = torch.float32) -> Tensor:
    return p.values(4, 6, 5, 8).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", QPARAMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_quantize(layout: str, p: Params, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](values(p, dtype))
    codes = quantize_codes(x, p.scale, p.zero_point, getattr(torch, p.qtype))
    expected = reference(x, p)
    near = (x.double() / p.scale).remainder(1).sub(0.5).abs() < 1e-4  # rounding to 16 bits makes ties
    assert (codes.int() - expected.int()).abs().max() <= 1 if codes.numel() else True
    assert torch.equal(codes[~near], expected[~near]) and near.float().mean() < 0.3 if codes.numel() > 1 else True
    assert (codes.shape, codes.dtype) == (expected.shape, expected.dtype)
    with FakeTensorMode() as mode:
        promised = torch.empty_like(mode.from_tensor(x), dtype=codes.dtype)
    assert strides(codes) == strides(promised) == strides(expected)
    assert not codes.numel() or codes.data_ptr() != x.data_ptr()


def test_quantize_saturates_at_both_ends() -> None:
    x = torch.tensor([float("inf"), float("-inf"), 1e30, -1e30, 3e9, -3e9] + [0.0] * 10)
    for p in QPARAMS:
        dtype = getattr(torch, p.qtype)
        assert torch.equal(quantize_codes(x, p.scale, p.zero_point, dtype), reference(x, p))


@pytest.mark.parametrize("p", [QPARAMS[1], QPARAMS[4]], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_quantize_makes_the_same_of_nan_when_it_is_compiled(p: Params, layout: str) -> None:
    """NaN is the largest code, whichever place it has in the vectors of the two kernels."""
    nan, inf = float("nan"), float("inf")
    row = torch.tensor([nan, inf, -inf, 0.3, -nan, -1.0, nan])
    dtype = getattr(torch, p.qtype)
    torch._dynamo.reset()
    compiled = torch.compile(quantize_codes, fullgraph=True, dynamic=True)
    for columns in (5, 16, 67):
        x = LAYOUTS[layout](row.repeat(columns)[: 6 * columns].reshape(1, 2, 3, columns))
        codes = quantize_codes(x, p.scale, p.zero_point, dtype)
        assert torch.equal(compiled(x, p.scale, p.zero_point, dtype), codes)
        info = torch.iinfo(dtype)
        assert (codes[x.isnan()] == info.max).all() and x.isnan().any()
        assert (codes[x == inf] == info.max).all() and (codes[x == -inf] == info.min).all()
        finite = x.isfinite()
        assert torch.equal(codes[finite], reference(x, p)[finite])


def test_exact_ties_may_be_rounded_to_the_other_side() -> None:
    """torch's kernel (since 2.9) adds the zero point before it rounds half to even, the reference after it: with an odd
    zero point an exact tie goes the other way. It is still a nearest code."""
    x = torch.arange(-20, 21) * 0.5
    for zero_point in (100, 101):
        p = Params(1.0, zero_point)
        difference = quantize_codes(x, 1.0, zero_point, torch.uint8).int() - reference(x, p).int()
        ties = x.remainder(1) == 0.5
        assert not difference[~ties].any() and difference.abs().max() <= 1
        assert not difference[ties].any() or zero_point % 2 == 1


def test_quantize_needs_no_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert not quantize_codes(x * 2, 0.1, 3, torch.uint8).requires_grad
    assert not quantize_codes((x * 2)[:, ::2], 0.1, 3, torch.uint8).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", QPARAMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dequantize_is_the_reference(layout: str, p: Params, dtype: torch.dtype) -> None:
    q = LAYOUTS[layout](reference(values(p), p))
    before, ones = q.clone(), (1,) * q.ndim
    zero = torch.full(ones, p.zero_point, dtype=torch.int32)
    expected = numerics.dequantize(q, torch.full(ones, p.scale), zero, [-1] * q.ndim, p.qtype, dtype)
    got = dequantize_codes(q, p.scale, p.zero_point, dtype)
    assert torch.equal(got, expected) and got.dtype == dtype and torch.equal(q, before)
    assert got.stride() == expected.stride() or layout in ("expanded", "sliced")  # nobody promised those


def test_codes_move_by_128() -> None:
    x = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(codes_to_unsigned(x).int(), x.int() + 128)


# ------------------------------------------------------------------------------------------------ int8 becomes uint8
def _conv(b: Builder, x: Any) -> Any:
    return b.call(aten.conv2d.default, x, b.weight(torch.linspace(-1, 1, 36).reshape(4, 1, 3, 3)), None)


def test_int8_values_are_rewritten_as_uint8() -> None:
    b, p = Builder(), Params(0.03, -5, "int8")
    x = p.values(2, 1, 7, 7)
    pool = b.act(b.call(aten.max_pool2d.default, b.act(b.input(x), p), [2, 2], [1, 1]), p)
    gm = b.done(b.act(_conv(b, pool), Params(0.05, 20, "int8")))
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, x)
    assert_close(expected, got, 0.05)
    assert lowered.report.claimed["int8 as uint8"] == 3 and not lowered.report.reference
    assert calls(lowered) == ["quantize_codes", "max_pool", "int8_layer", "dequantize_codes"]
    assert layers(lowered)[0].output.dtype == torch.uint8 and layers(lowered)[0].output.zero_point == 148


def test_int8_codes_that_somebody_sees_stay_int8() -> None:
    b, p = Builder(), Params(0.03, -5, "int8")
    x = p.values(2, 1, 7, 7)
    q = b.quantize(b.input(x), p)
    args = b._args(q, p)
    y = _conv(b, b.call(torch.ops.inc.dequantize.default, q, *args, torch.float32))
    gm = b.done(y, q)
    lowered = lower(gm)
    (float_, codes) = run_both(gm, lowered, x)
    assert_close(*float_)
    assert torch.equal(*codes) and codes[1].dtype == torch.int8
    assert "codes_to_unsigned" in calls(lowered)


def test_seven_bit_types_keep_their_range() -> None:
    for qtype, zero in (("int7", -3), ("uint7", 60)):
        b, p = Builder(), Params(0.03, zero, qtype)
        x = p.values(2, 1, 7, 7) * 2  # saturates at 63 or 127
        gm = b.done(_conv(b, b.act(b.input(x), p)))
        lowered = lower(gm)
        ((expected, got),) = run_both(gm, lowered, x)
        assert_close(expected, got)
        assert calls(lowered)[0] == "inc.quantize.default" and "int8_layer" in calls(lowered)


# -------------------------------------------------------------------------------------------------------- per channel
def test_other_granularities_stay_on_the_reference() -> None:
    b = Builder()
    x = torch.randn(3, 8)
    scale, zero = b.const(torch.full((3, 1), 0.02)), b.const(torch.zeros(3, 1, dtype=torch.int32))
    args = (scale, zero, [1, -1], "int8")
    q = b.call(torch.ops.inc.quantize.default, b.input(x), *args)
    dq = b.call(torch.ops.inc.dequantize.default, q, *args, torch.float32)
    gm = b.done(b.call(aten.linear.default, dq, b.weight(torch.randn(4, 8)), None))
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, x)
    assert torch.equal(expected, got)
    ((_, reason),) = lowered.report.missed.values()
    assert reason == "its input is int8 in blocks [1, -1]; the kernel takes one static 8-bit scale"
    assert lowered.report.reference == {"inc.quantize.default": 1, "inc.dequantize.default": 1}  # of the input


# ------------------------------------------------------------------------------------------------------------ lookups
@pytest.mark.parametrize("qtype, scheme", [("int8", "symmetric"), ("int7", "symmetric"), ("uint8", "asymmetric"),
                                           ("int8", "asymmetric")])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 3)], ids=str)
def test_lookups(qtype: str, scheme: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    b = Builder()
    index = torch.randint(0, 9, shape)
    i = b.input(index)
    table = b.weight(torch.randn(9, 4).to(dtype) + 0.3, qtype, scheme=scheme)
    gm = b.done(b.call(aten.embedding.default, table, i))
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, index)
    assert torch.equal(expected, got)
    assert lowered.report.claimed == {"int8 lookup": 1} and calls(lowered) == ["lookup_rows"]


@pytest.mark.parametrize("qtype, block, taken", [
    ("int4", [1, -1], True), ("int8", [1, 2], True), ("int8", [-1, -1], True), ("int16", [1, -1], False),
])  # fmt: skip
def test_other_tables(qtype: str, block: list[int], taken: bool) -> None:
    b = Builder()
    i = b.input(torch.tensor([1, 2]))
    gm = b.done(b.call(aten.embedding.default, b.weight(torch.randn(9, 4), qtype, block), i))
    lowered = lower(gm)
    assert bool(lowered.report.kernels) == taken
    assert taken or qtype in next(iter(lowered.report.missed.values()))[1]
    assert torch.equal(*run_both(gm, lowered, torch.tensor([1, 2]))[0])


def test_lookup_of_a_row_that_is_not_there_is_an_error() -> None:
    table, scale = torch.ones(3, 2, dtype=torch.int8), torch.ones(3, 1)
    with pytest.raises(IndexError):
        lookup_rows(table, scale, None, torch.tensor([3]), torch.float32)


# ------------------------------------------------------------------------------------------------------------- spread
def test_spread() -> None:
    x = torch.tensor([[[1, 2, 3]]], dtype=torch.uint8)
    assert spread(x, [2], [1], [2], 9).tolist() == [[[9, 1, 9, 2, 9, 3, 9, 9]]]
    assert spread(x, [3], [-1], [0], 9).tolist() == [[[9, 9, 2, 9, 9, 3]]]
    assert spread(x, [1], [-1], [-1], 9).tolist() == [[[2]]]
    y = spread(torch.zeros(2, 3, 4, 5, dtype=torch.uint8), [1, 2], [0, 1], [0, 1], 7)
    assert y.shape == (2, 3, 4, 11) and y.is_contiguous(memory_format=torch.channels_last)


def test_every_function_on_codes_is_exported() -> None:
    made_here = {n for n, f in vars(_codes).items() if getattr(f, "__module__", "") == _codes.__name__}
    assert set(_codes.__all__) == {n for n in made_here if not n.startswith("_")}
