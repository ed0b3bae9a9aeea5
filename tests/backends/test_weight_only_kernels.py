"""Weight-only operators: every format, block and number of rows against the reference in float64, each way of computing
them, and what tools need of an operator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph import numerics
from inc_graph.errors import SpecError
from inc_graph.lowering import _weight_only as wo
from inc_graph.lowering._weight_only_native import kernels
from inc_graph.packing import pack
from inc_graph.qtypes import get_qtype

FORMATS = ["int2", "int3", "uint3", "int4", "uint4", "int5", "uint6", "int6", "int7", "int8", "uint8",
           "nf4", "fp4", "fp4_bnb", "fp8_e4m3", "fp8_e5m2", "mxfp6_e2m3", "mxint8"]  # fmt: skip
BLOCKS = [(1, 32), (1, -1), (1, 48), (1, 20), (1, 128), (4, 1), (-1, 1), (2, 64), (-1, -1)]
SHAPES = [(9, 160), (5, 77), (6, 1100)]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setenv("INC_NATIVE", "0")
    elif kernels() is None:
        pytest.skip("no C compiler here")
    wo.taken.clear()
    yield request.param


_native = kernels()
NARROW = _native is not None and _native.bf16_rows
"""Whether rows in bfloat16 have a compiled product of their own."""


class Weight:
    """A random weight in a format; asymmetric ones have zero points off the middle."""

    def __init__(self, shape: tuple[int, ...], qtype: str, block: tuple[int, ...], zero: torch.dtype | None = None,
                 scale: torch.dtype = torch.float16, seed: int = 0) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(shape, generator=generator) * 0.05 + (0.02 if zero is not None else 0)
        s, z = numerics.choose_qparams(w, block, qtype, "symmetric" if zero is None else "asymmetric")
        self.scale = s.to(scale)
        self.zero = z.to(zero) if zero is not None else None if not bool(z.any()) else z
        if zero is not None and zero.is_floating_point:
            self.zero = (z + torch.rand(z.shape, generator=generator) - 0.5).to(zero)
        self.carrier = numerics.quantize(w, self.scale, self.zero, block, qtype)
        self.codes = pack(self.carrier, qtype) if get_qtype(qtype).storage_bits < 8 else self.carrier
        self.block, self.qtype, self.shape = list(block), qtype, shape

    def args(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.zero

    def values(self, dtype: torch.dtype) -> Tensor:
        return numerics.dequantize(self.carrier, self.scale, self.zero, self.block, self.qtype, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None, compute: torch.dtype = torch.float32) -> Tensor:
        return wo.weight_only_linear(x, *self.args(), bias, self.block, self.qtype, compute)


def check(w: Weight, x: Tensor, bias: Tensor | None, compute: torch.dtype) -> None:
    """Against float64 with the inputs that the computation has: x and W rounded to the compute dtype, nothing else."""
    got = w.linear(x, bias, compute)
    assert (got.dtype, got.shape) == (x.dtype, (*x.shape[:-1], w.shape[0]))
    shift = None if bias is None else bias.double()
    rounded = [x.to(compute).double(), w.values(compute).double()]
    expected = F.linear(*rounded, shift)
    size = F.linear(*[t.abs() for t in rounded], None if shift is None else shift.abs())
    # float32 sums; then one or two roundings of the result (compute dtype, dtype of x) and one of the bias.
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(compute).eps)
    slack = 1e-6 * size + 1.01 * eps * (expected.abs() + (0 if shift is None else shift.abs()))
    assert ((got.double() - expected).abs() <= slack + 1e-30).all(), (got.double() - expected).abs().max()


# ------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("qtype", FORMATS)
def test_values_are_those_of_the_reference_bit_for_bit(qtype: str, way: str) -> None:
    zeros = [None, torch.int8, torch.uint8, torch.int32, torch.float32, torch.float16]
    for i, (shape, block) in enumerate((s, b) for s in SHAPES for b in BLOCKS):
        integer = get_qtype(qtype).is_int and not qtype.startswith("mx")
        zero = zeros[i % len(zeros)] if integer else None
        if zero is torch.int8 and not get_qtype(qtype).signed and qtype not in ("uint3", "uint4", "uint6"):
            zero = torch.int32  # does not hold 255
        if zero is torch.uint8 and get_qtype(qtype).signed:
            zero = torch.int32
        scale = (torch.float16, torch.bfloat16, torch.float32)[i % 3]
        w = Weight(shape, qtype, block, zero, scale, seed=i)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = wo.dequantize_weight(*w.args(), w.block, qtype, shape, dtype)
            assert torch.equal(got, w.values(dtype)), (shape, block, zero, scale, dtype)
    assert set(wo.taken) == {"values" if way == "native" else "torch values"}


@pytest.mark.parametrize("shape, block", [
    ((8, 12, 3, 3), (1, 4, -1, -1)), ((8, 12, 1, 1), (1, 4, -1, -1)), ((8, 12, 3, 3), (1, -1, -1, -1)),
    ((6, 8, 4), (1, 1, -1)), ((6, 8, 4), (1, 1, 3)), ((2, 3, 16), (1, -1, -1)), ((4, 6, 3), (2, -1, -1)),
    ((8, 10, 3), (1, 4, -1)), ((4, 4, 4), (2, 1, 2)), ((3, 2, 2, 40), (-1, -1, -1, -1)),
])  # fmt: skip
@pytest.mark.parametrize("qtype", ["int4", "int3", "uint4", "int8", "nf4"])
def test_values_of_any_rank(shape: tuple[int, ...], block: tuple[int, ...], qtype: str, way: str) -> None:
    w = Weight(shape, qtype, block)
    got = wo.dequantize_weight(*w.args(), w.block, qtype, shape, torch.float32)
    assert torch.equal(got, w.values(torch.float32))


def test_nan_and_infinities_of_float8_stay(way: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).reshape(4, 64)
    scale = torch.full((4, 1), 0.5)
    for dtype in (torch.float32, torch.bfloat16):
        got = wo.dequantize_weight(codes, scale, None, [1, -1], "fp8_e5m2", [4, 64], dtype)
        expected = numerics.dequantize(codes, scale, None, [1, -1], "fp8_e5m2", dtype)
        assert torch.equal(got.isnan(), expected.isnan()) and got.isnan().any() and got.isinf().any()
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


# ------------------------------------------------------------------------------------------------------------- linear
@pytest.mark.parametrize("qtype", FORMATS)
def test_linear_is_the_product_with_the_values(qtype: str, way: str) -> None:
    for i, (shape, block) in enumerate((s, b) for s in ((37, 160), (6, 1100)) for b in BLOCKS):
        w = Weight(shape, qtype, block, scale=(torch.float16, torch.bfloat16, torch.float32)[i % 3], seed=i)
        generator = torch.Generator().manual_seed(i)
        for m in ((1, 3), (2, wo.FEW), (5, wo.FEW + 1))[i % 3]:
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(i + m) % 3]
            x = torch.randn(m, shape[1], generator=generator).to(dtype)
            bias = torch.randn(shape[0], generator=generator).to(dtype) if (i + m) % 2 else None
            check(w, x, bias, torch.float32 if i % 2 else torch.bfloat16)
    ways = {"few rows", "many rows"} | ({"some rows"} if NARROW else set())
    assert set(wo.taken) == (ways if way == "native" else {"torch"})


@pytest.mark.parametrize("m", [wo.FEW + 1, wo.FEW + 2, 33, 129, 257, 514, wo.SOME, wo.SOME + 1])
@pytest.mark.parametrize("qtype, shape, block", [
    ("int4", (37, 160), (1, 32)), ("uint4", (8, 2100), (1, 64)), ("int8", (300, 1024), (1, -1)),
    ("int3", (5, 33), (1, -1)), ("nf4", (131, 1056), (1, 32)), ("int4", (40, 96), (8, 1)),
])  # fmt: skip
def test_some_rows_of_any_number(m: int, qtype: str, shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Tiles of three rows by eight, blocks of 256 rows by 1024 columns, and what is left of each."""
    wo.taken.clear()
    generator = torch.Generator().manual_seed(m)
    w = Weight(shape, qtype, block, torch.uint8 if qtype == "uint4" else None, torch.float16)
    bias = torch.randn(shape[0], generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(m, shape[1], generator=generator)
        check(w, x.to(dtype), bias.to(dtype), torch.bfloat16)
    way = "some rows" if NARROW and m <= wo.SOME else "many rows" if _native is not None else "torch"
    assert wo.taken == {way: 2}


@pytest.mark.parametrize("zero", [torch.uint8, torch.int32, torch.float32])
@pytest.mark.parametrize("m", [1, 4, 40])
def test_linear_with_zero_points(zero: torch.dtype, m: int, way: str) -> None:
    for block in ((1, 32), (1, 24), (8, 1)):
        w = Weight((50, 96), "uint4", block, zero)
        check(w, torch.randn(m, 96, generator=torch.Generator().manual_seed(m)), None, torch.float32)


@pytest.mark.parametrize("compute, x", [(torch.float64, torch.float64), (torch.float16, torch.float16)])
def test_other_compute_dtypes_are_honoured(compute: torch.dtype, x: torch.dtype) -> None:
    wo.taken.clear()
    w = Weight((20, 64), "int4", (1, 32))
    y = w.linear(torch.ones(2, 64, dtype=x), None, compute)
    expected = F.linear(torch.ones(2, 64, dtype=x), w.values(compute))
    assert torch.equal(y, expected) and set(wo.taken) == {"torch"}


def test_leading_dimensions_strides_and_empty_inputs(way: str) -> None:
    w = Weight((24, 64), "int4", (1, 32))
    x = torch.randn(3, 2, 2, 64, generator=torch.Generator().manual_seed(0))
    whole = w.linear(x.reshape(-1, 64))
    assert torch.equal(w.linear(x), whole.reshape(3, 2, 2, 24))
    odd = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).t()
    assert torch.equal(w.linear(odd), w.linear(odd.contiguous()))
    assert w.linear(x[0, 0, 0]).shape == (24,)
    assert w.linear(x[:0]).shape == (0, 2, 2, 24)
    strided = copy.copy(w)
    strided.codes = torch.stack([w.codes, w.codes], 1)[:, 0]
    strided.scale = torch.stack([w.scale, w.scale], -1)[..., 0]
    assert torch.equal(strided.linear(x), w.linear(x))


def test_nan_beside_a_row_does_not_leak_into_it(way: str) -> None:
    """Rows of 33 columns: a vector that reads past the end of one would meet the next."""
    w = Weight((8, 33), "int4", (1, -1))
    for m in (3, wo.FEW + 5):
        x = torch.ones(m, 33)
        x[1] = torch.nan
        for compute in (torch.float32, torch.bfloat16):
            y = w.linear(x, None, compute)
            assert y[1].isnan().all() and y[[0, *range(2, m)]].isfinite().all() and torch.equal(y[0], y[2])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    w = Weight((515, 256), "int4", (1, 32))
    before = torch.get_num_threads()
    inputs = [torch.randn(m, 256, generator=torch.Generator().manual_seed(0)) for m in (3, 140)]
    expected = [w.linear(x, None, torch.bfloat16) for x in inputs]
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(w.linear(x, None, torch.bfloat16), y) for x, y in zip(inputs, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_shapes_that_do_not_fit_are_errors_not_reads_past_the_end(way: str) -> None:
    w = Weight((24, 64), "int4", (1, 32))
    codes, scale, zero = w.args()
    x = torch.ones(1, 64)
    with pytest.raises(SpecError, match="pack to"):
        w.linear(torch.ones(1, 96))
    with pytest.raises(SpecError):
        wo.weight_only_linear(x, codes, scale[:, :1], zero, None, [1, 32], "int4", torch.float32)
    with pytest.raises(SpecError):
        wo.weight_only_linear(x, codes, scale[:8], zero, None, [1, 32], "int4", torch.float32)
    with pytest.raises(SpecError):
        wo.weight_only_linear(x, codes, scale, zero, None, [1, 16], "int4", torch.float32)
    with pytest.raises(SpecError, match=r"int8 codes must be torch\.int8"):
        wo.weight_only_linear(x, codes, scale, zero, None, [1, 32], "int8", torch.float32)


# ------------------------------------------------------------------------------------------------------------- tables
@pytest.mark.parametrize("qtype", ["int4", "int8", "nf4", "fp8_e4m3", "uint3"])
@pytest.mark.parametrize("block", [(1, 32), (1, -1), (4, 1), (-1, -1)])
def test_lookup_reads_only_the_rows_asked_for(qtype: str, block: tuple[int, int], way: str) -> None:
    w = Weight((50, 72), qtype, block)
    index = torch.tensor([[3, 49], [0, 3]])
    got = wo.lookup(index, *w.args(), w.block, qtype, 72, torch.float32)
    assert torch.equal(got, w.values(torch.float32)[index])
    assert wo.lookup(index[:0], *w.args(), w.block, qtype, 72, torch.bfloat16).shape == (0, 2, 72)


# --------------------------------------------------------------------------------------------------- as an operator
@pytest.mark.parametrize("m", [2, wo.FEW + 1, wo.SOME + 1])
def test_what_it_gives_can_be_changed_in_place_while_gradients_are_recorded(m: int, way: str) -> None:
    w = Weight((24, 64), "int4", (1, 32))
    for shape in ((m, 64), (1, m, 64), (64,)):
        x, bias = torch.randn(shape).requires_grad_(), torch.randn(24).requires_grad_()
        y = w.linear(x, bias, torch.bfloat16)
        y += 1
        F.relu(y, inplace=True).sum().backward()
        assert x.grad is not None and bias.grad is not None


def test_opcheck(way: str) -> None:
    for zero in (None, torch.uint8):
        w = Weight((33, 70), "uint4", (1, 32), zero)
        x, bias = torch.randn(5, 70, requires_grad=True), torch.randn(33, requires_grad=True)
        args = (x, *w.args(), bias, w.block, w.qtype, torch.float32)
        torch.library.opcheck(torch.ops.inc_cpu.weight_only_linear.default, args)
        values = (*w.args(), w.block, w.qtype, w.shape, torch.bfloat16)
        torch.library.opcheck(torch.ops.inc_cpu.dequantize_weight.default, values)


def test_gradients_are_those_of_a_linear_layer(way: str) -> None:
    w = Weight((33, 70), "int4", (1, 32))
    x, bias = torch.randn(2, 3, 70, requires_grad=True), torch.randn(33, requires_grad=True)
    again = [t.detach().clone().requires_grad_() for t in (x, bias)]
    weights = torch.randn(2, 3, 33)
    (w.linear(x, bias) * weights).sum().backward()
    (F.linear(again[0], w.values(torch.float32), again[1]) * weights).sum().backward()
    for got, expected in zip((x, bias), again, strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-6)


class Layer(nn.Module):
    def __init__(self, w: Weight) -> None:
        super().__init__()
        self.w = w
        self.register_buffer("codes", w.codes)
        self.register_buffer("scale", w.scale)
        self.adapter = nn.Linear(w.shape[1], w.shape[0], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = wo.weight_only_linear(x, self.codes, self.scale, None, None, self.w.block, self.w.qtype, torch.float32)
        return torch.relu(y + 1) * 2 + self.adapter(x)


def test_torch_compile_takes_it_whole_with_changing_rows() -> None:
    layer = Layer(Weight((40, 64), "int4", (1, 32)))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (1, 3, 17, 64):
        x = torch.randn(m, 64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    x = torch.randn(4, 64, requires_grad=True)
    compiled(x).sum().backward()
    got, x.grad = x.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-5)
    assert layer.adapter.weight.grad is not None  # an adapter on top is trained through it


def test_torch_export_and_run() -> None:
    layer = Layer(Weight((40, 64), "int4", (1, 32))).eval()
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(layer, (torch.randn(4, 64),), dynamic_shapes={"x": {0: rows}})
    assert torch.ops.inc_cpu.weight_only_linear.default in [n.target for n in program.graph.nodes]
    for m in (2, 30):
        x = torch.randn(m, 64)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_on_another_device_it_is_computed_by_torch() -> None:
    w = Weight((40, 64), "int4", (1, 32))
    y = wo.weight_only_linear(
        torch.empty(3, 64, device="meta"), w.codes.to("meta"), w.scale.to("meta"), None, None, w.block, w.qtype,
        torch.bfloat16,
    )  # fmt: skip
    assert y.device.type == "meta" and y.shape == (3, 40)
