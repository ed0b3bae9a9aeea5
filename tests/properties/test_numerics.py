"""What must hold of the reference maths for every tensor, block and format."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ALL, CODEBOOKS, FLOATS, INTS, MX, Case, blocks, cases, methods, same, shapes, spread, tensors

from inc_graph import numerics as N
from inc_graph.errors import SpecError, UnknownNameError
from inc_graph.qtypes import QType, get_qtype
from inc_graph.spec import PerBlock, PerChannel, PerGroup, PerTensor, scale_shape

HALVES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = [name for name in ALL if name not in MX]


def solve(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return N.choose_qparams(case.x, case.block, case.qtype, case.method)


def there_and_back(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, zero_point = solve(case)
    q = N.quantize(case.x, scale, zero_point, case.block, case.qtype)
    return scale, zero_point, q, N.dequantize(q, scale, zero_point, case.block, case.qtype)


def values_of(qtype: QType) -> torch.Tensor:
    """Every finite value of a float or codebook format, ascending, in float64."""
    if qtype.codebook is not None:
        return torch.tensor(sorted(set(qtype.codebook)), dtype=torch.float64)
    codes = torch.arange(256, dtype=torch.uint8).view(qtype.carrier).double()
    return codes[codes.isfinite()].unique()


# -- error -----------------------------------------------------------------------------------------


@given(cases(INTS))
def test_error_is_at_most_half_a_step(case: Case) -> None:
    if case.qtype.name in MX:
        return  # power-of-two scales saturate by design: see the nearest-value test
    scale, _, _, back = there_and_back(case)
    step = spread(scale, case.x.shape, case.block).double()
    # float32 rounds x * (1 / scale) and (q - zero_point) * scale, each by some 2**-23 of up to qmax - qmin steps.
    slack = (case.qtype.qmax - case.qtype.qmin) * 2.0**-21
    assert ((case.x.double() - back.double()).abs() <= step * (0.5 + slack)).all()


@given(cases(FLOATS + CODEBOOKS + ["mxint8"]))
def test_result_is_the_nearest_representable_value(case: Case) -> None:
    scale, _, _, back = there_and_back(case)
    step = spread(scale, case.x.shape, case.block).double()
    table = torch.arange(-127, 128, dtype=torch.float64) if case.qtype.is_int else values_of(case.qtype)
    ideal = (case.x.double().unsqueeze(-1) - table * step.unsqueeze(-1)).abs().amin(-1)
    slack = 2.0**-21 * torch.maximum(case.x.double().abs(), step)
    assert ((case.x.double() - back.double()).abs() <= ideal + slack).all()


@given(cases(INTS), st.integers(-3, 3))
def test_out_of_range_saturates(case: Case, shift: int) -> None:
    scale, zero_point = solve(case)
    scale = (scale * 2.0**shift).clamp_min(2.0**-126)  # legal scales have a finite reciprocal
    q = N.quantize(case.x, scale, zero_point, case.block, case.qtype)
    wide = spread(scale, case.x.shape, case.block).double()
    offset = spread(zero_point, case.x.shape, case.block)
    exact = case.x.double() / wide + offset
    assert (q[exact > case.qtype.qmax + 1] == case.qtype.qmax).all()
    assert (q[exact < case.qtype.qmin - 1] == case.qtype.qmin).all()
    inside = N.in_range(case.x, scale, zero_point, case.block, case.qtype)
    assert inside[(exact > case.qtype.qmin) & (exact < case.qtype.qmax)].all()
    assert not inside[(exact > case.qtype.qmax + 1) | (exact < case.qtype.qmin - 1)].any()


@given(st.data())
def test_finer_blocks_have_finer_steps(data: st.DataObject) -> None:
    """A block inside another has a smaller range, so a smaller scale and a smaller bound on the error."""
    case = data.draw(cases([n for n in INTS if n not in MX], min_dims=1))
    finer = data.draw(
        st.tuples(*(st.sampled_from([1] if g == 1 else [g, 1] if g > 1 else [-1, 1, 2, 3]) for g in case.block))
    )
    coarse, _ = solve(case)
    fine, zero_point = N.choose_qparams(case.x, finer, case.qtype, case.method)
    bound = spread(coarse, case.x.shape, case.block)
    zero = spread(N.block_range(case.x.abs(), finer)[1], case.x.shape, finer) == 0  # such a block has scale 1
    assert (zero | (spread(fine, case.x.shape, finer) <= bound)).all()
    back = N.fake_quantize(case.x, fine, zero_point, finer, case.qtype)
    slack = (case.qtype.qmax - case.qtype.qmin) * 2.0**-21
    assert ((case.x.double() - back.double()).abs() <= bound.double() * (0.5 + slack)).all()


def test_many_bits_converge_to_the_real_values() -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for name in ("int2", "int3", "int4", "int7", "int8", "int16"):
        scale, zero_point = N.choose_qparams(x, (1, -1), name, "symmetric")
        errors.append(float((x - N.fake_quantize(x, scale, zero_point, (1, -1), name)).abs().max()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


# -- algebra ---------------------------------------------------------------------------------------


@given(cases(ALL))
def test_idempotent(case: Case) -> None:
    scale, zero_point, q, back = there_and_back(case)
    assert same(N.quantize(back, scale, zero_point, case.block, case.qtype), q)


@given(cases(ALL, HALVES, min_side=0))
def test_scales_are_positive_and_codes_in_range(case: Case) -> None:
    scale, zero_point, q, back = there_and_back(case)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert scale.shape == zero_point.shape == scale_shape(case.x.shape, case.block)
    assert (scale > 0).all() and scale.isfinite().all() and scale.reciprocal().isfinite().all()
    assert q.dtype == case.qtype.carrier and back.isfinite().all()
    if case.qtype.is_int:
        for part in (q, zero_point):
            assert ((part >= case.qtype.qmin) & (part <= case.qtype.qmax)).all()
    elif case.qtype.codebook is not None:
        assert not zero_point.any() and (q < len(case.qtype.codebook)).all()


@given(cases(ALL))
def test_zero_is_exact(case: Case) -> None:
    scale, zero_point = solve(case)
    back = N.fake_quantize(torch.zeros_like(case.x), scale, zero_point, case.block, case.qtype)
    assert not back.any()


@given(st.data())
def test_monotone(data: st.DataObject) -> None:
    case = data.draw(cases(ALL, min_dims=1, max_dims=1))
    scale, zero_point = N.choose_qparams(case.x, (-1,), case.qtype, case.method)
    x = case.x.sort().values * data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    assert (N.fake_quantize(x, scale, zero_point, (-1,), case.qtype).diff() >= 0).all()


@given(cases([n for n in ALL if n != "nf4" and get_qtype(n).qmin == -get_qtype(n).qmax]))
def test_symmetric_formats_are_odd(case: Case) -> None:
    scale, _ = solve(case)
    there = N.fake_quantize(case.x, scale, None, case.block, case.qtype)
    assert torch.equal(N.fake_quantize(-case.x, scale, None, case.block, case.qtype), -there)


@given(cases(ALL, (*HALVES, torch.float64), min_side=0))
def test_fake_quantize_is_quantize_then_dequantize(case: Case) -> None:
    scale, zero_point = solve(case)
    for zp in (zero_point, None):
        q = N.quantize(case.x, scale, zp, case.block, case.qtype)
        back = N.dequantize(q, scale, zp, case.block, case.qtype, case.x.dtype)
        assert same(N.fake_quantize(case.x, scale, zp, case.block, case.qtype), back)


# -- blocks ----------------------------------------------------------------------------------------


@given(cases(ALL, HALVES))
def test_blocks_agree_with_one_scale_per_element(case: Case) -> None:
    scale, zero_point, q, back = there_and_back(case)
    each = (1,) * case.x.dim()
    scale, zero_point = (spread(p, case.x.shape, case.block) for p in (scale, zero_point))
    assert same(N.quantize(case.x, scale, zero_point, each, case.qtype), q)
    assert same(N.dequantize(q, scale, zero_point, each, case.qtype), back)


@given(st.data())
def test_reductions_agree_with_loops(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    x, block = data.draw(tensors(shape)), data.draw(blocks(shape))
    low, high = N.block_range(x, block)
    total = N.block_reduce(x.double(), block, "sum")
    for index in itertools.product(*(range(n) for n in scale_shape(shape, block))):
        where = (slice(None) if g == -1 else slice(i * g, (i + 1) * g) for i, g in zip(index, block, strict=True))
        part = x[tuple(where)]
        assert low[index] == part.min() and high[index] == part.max()
        torch.testing.assert_close(total[index], part.double().sum())


@given(cases(ALL, min_dims=2, max_dims=2))
def test_granularities_that_mean_the_same(case: Case) -> None:
    columns = case.x.shape[1]
    for a, b in (
        (PerGroup(columns), PerChannel(0)),
        (PerGroup(-1), PerChannel(0)),
        (PerBlock((-1, -1)), PerTensor()),
        (PerBlock(tuple(case.x.shape)), PerTensor()),
        (PerBlock((1, 1)), PerGroup(1)),
    ):
        left = there_and_back(Case(case.x, a.block(2), case.qtype, case.method))
        right = there_and_back(Case(case.x, b.block(2), case.qtype, case.method))
        assert all(same(m, n) for m, n in zip(left, right, strict=True))


@given(st.sampled_from(ALL), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_blocks_are_independent(name: str, groups: int, size: int, seed: int) -> None:
    """Permuting blocks permutes the results, and a block alone gives what it gives among others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, groups, size, generator=generator)
    order = torch.randperm(groups, generator=generator)
    method = "asymmetric" if name in INTS and name not in MX else "symmetric"

    def run(t: torch.Tensor) -> torch.Tensor:
        flat = t.reshape(3, -1)
        scale, zero_point = N.choose_qparams(flat, (1, size), name, method)
        return N.quantize(flat, scale, zero_point, (1, size), name).reshape(t.shape)

    assert same(run(x)[:, order], run(x[:, order]))
    assert same(run(x)[:, :1], run(x[:, :1]))


# -- special values --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity(name: str, dtype: torch.dtype) -> None:
    qtype = get_qtype(name)
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=dtype)
    scale = torch.tensor([0.5])
    points = [None]
    if qtype.is_int:
        points.append(torch.tensor([max(int(qtype.qmin), 1)], dtype=torch.int32))
    for zero_point in points:
        q = N.quantize(x, scale, zero_point, (-1,), name)
        back = N.dequantize(q, scale, zero_point, (-1,), name)
        offset = 0 if zero_point is None else int(zero_point)
        assert back[1:3].tolist() == [(qtype.qmax - offset) * 0.5, (qtype.qmin - offset) * 0.5]
        assert back[0].isnan() if qtype.kind == "float" else same(back[0], back[3])
        assert same(N.fake_quantize(x.float(), scale, zero_point, (-1,), name), back)
    assert N.in_range(x, scale, None, (-1,), name).tolist() == [False, False, False, True]


@pytest.mark.parametrize("name", FLOAT32)
def test_blocks_with_nan_or_infinity_have_no_scale(name: str) -> None:
    """All they are dequantized to is NaN; zero points and the scales of other blocks are as ever."""
    qtype = get_qtype(name)
    top = torch.finfo(torch.float32).max
    nan, inf = math.nan, math.inf
    x = torch.tensor([[nan, 2.0], [nan, nan], [inf, 1.0], [-inf, inf], [top, -top], [1e-45, 0.0], [0.0, 0.0]])
    for method in ("symmetric", "asymmetric") if qtype.is_int else ("symmetric",):
        scale, zero_point = N.choose_qparams(x, (1, -1), name, method)
        assert scale[:4].isnan().all() and (scale[4:] > 0).all() and scale[4:].isfinite().all()
        assert scale[6] == 1 and (zero_point[:4] == zero_point[6]).all()
        assert all(map(same, N.choose_qparams(x[4:], (1, -1), name, method), (scale[4:], zero_point[4:])))
        assert N.choose_qparams(x, (-1, -1), name, method)[0].isnan().all()
        back = N.fake_quantize(x, scale, zero_point, (1, -1), name)
        assert back[4:].isfinite().all() and (back[4].sign() == x[4].sign()).all()
        codes = N.quantize(x, scale, zero_point, (1, -1), name)
        assert same(back, N.dequantize(codes, scale, zero_point, (1, -1), name))
        assert back[:4].isnan().all() and back[4:].isfinite().all()
        assert (back[4].sign() == x[4].sign()).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), ()])
def test_empty_and_scalar(name: str, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    for block in ((-1,) * len(shape), (1,) * len(shape), (2,) * len(shape)):
        scale, zero_point = N.choose_qparams(x, block, name, "symmetric")
        assert scale.shape == scale_shape(shape, block)
        assert N.fake_quantize(x, scale, zero_point, block, name).shape == shape


def test_arguments_are_left_alone() -> None:
    for name, x in itertools.product(ALL, (torch.randn(4, 6), torch.randn(4, 6).half())):
        scale, zero_point = N.choose_qparams(x, (1, 4), name, "symmetric")
        kept = [t.clone() for t in (x, scale, zero_point)]
        q = N.quantize(x, scale, zero_point, (1, 4), name)
        codes = q.clone()
        for out in (N.dequantize(q, scale, zero_point, (1, 4), name), N.fake_quantize(x, scale, None, (1, 4), name)):
            out.zero_()
        assert same(q, codes) and all(same(a, b) for a, b in zip(kept, (x, scale, zero_point), strict=True))


# -- scales ----------------------------------------------------------------------------------------


@given(cases(MX))
def test_mx_scales_are_powers_of_two(case: Case) -> None:
    scale, _ = solve(case)
    assert (scale.frexp().mantissa == 0.5).all()
    absmax = N.block_range(case.x.abs(), case.block)[1]
    for s, a in zip(scale.flatten().tolist(), absmax.flatten().tolist(), strict=True):
        top = math.frexp(case.qtype.qmax)[1]
        assert s == (1.0 if a == 0 else 2.0 ** max(math.frexp(a)[1] - top, -126))


def test_known_scales() -> None:
    low, high = torch.tensor([-1.0, 0.5, -4.0, 0.0]), torch.tensor([3.0, 2.0, -1.0, 0.0])
    scale, zero_point = N.affine_qparams(low, high, "uint8", "asymmetric")
    torch.testing.assert_close(scale, torch.tensor([4 / 255, 2 / 255, 4 / 255, 1.0]))
    assert zero_point.tolist() == [64, 0, 255, 0]
    scale, zero_point = N.affine_qparams(low, high, "int8", "symmetric")
    torch.testing.assert_close(scale, torch.tensor([3 / 127.5, 2 / 127.5, 4 / 127.5, 1.0]))
    assert zero_point.tolist() == [0] * 4
    assert N.affine_qparams(low, high, "uint8", "symmetric")[1].tolist() == [128] * 4
    assert N.affine_qparams(low, high, "nf4", "symmetric")[0].tolist() == [3.0, 2.0, 4.0, 1.0]


def test_codebook_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -2.5, -5.0])
    one = torch.ones(1)
    assert N.fake_quantize(ties, one, None, (-1,), "fp4").tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -2, -4]


@pytest.mark.parametrize("qtype", [n for n in ALL if get_qtype(n).codebook])
def test_codebook_by_brute_force(qtype: str) -> None:
    book = torch.tensor(get_qtype(qtype).codebook, dtype=torch.float64)
    x = torch.linspace(1.3 * float(book.min()), 1.3 * float(book.max()), 4001)
    back = N.fake_quantize(x, torch.ones(1), None, (-1,), qtype)
    ideal = (x.double().unsqueeze(-1) - book).abs().amin(-1)
    torch.testing.assert_close((x.double() - back.double()).abs(), ideal, rtol=0, atol=1e-7)


@given(st.integers(0, 9999), st.floats(1e-9, 1e-3))
@settings(max_examples=30)
def test_wide_bias(seed: int, step: float) -> None:
    """int32 codes are exact integers: the error stays half a step, though float32 cannot hold the code."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    scale = torch.tensor([step])
    q = N.quantize(x, scale, None, (-1,), "int32")
    exact = (x.double() * (1 / scale).double()).round().clamp(-(2**31), 2**31 - 1)
    assert torch.equal(q.double(), exact)
    back = N.dequantize(q, scale, None, (-1,), "int32", torch.float64)
    assert torch.equal(back, q.double() * scale.double())
    ends = N.quantize(torch.tensor([1e30, -1e30, math.nan]), scale, None, (-1,), "int32")
    assert ends.tolist() == [2**31 - 1, -(2**31), 0]
    _, zero_point = N.affine_qparams(torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 1.0]), "int32", "asymmetric")
    assert zero_point.tolist() == [2**31 - 1, -(2**31)]


# -- packing ---------------------------------------------------------------------------------------

PACKED = [*ALL, "int32"]


@st.composite
def codes(draw: st.DrawFn) -> tuple[torch.Tensor, str]:
    name = draw(st.sampled_from(PACKED))
    qtype = get_qtype(name)
    shape = (*draw(shapes(0, 2, 0)), *draw(st.sampled_from([(), (0,), (1,), (3,), (8,), (9,), (17,)])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    if qtype.kind == "float":
        return torch.randint(0, 256, shape, generator=generator).to(torch.uint8).view(qtype.carrier), name
    top = len(qtype.codebook) - 1 if qtype.codebook else int(qtype.qmax)
    low = 0 if qtype.codebook else int(qtype.qmin)
    q = torch.randint(low, top + 1, shape, generator=generator).to(qtype.carrier)
    return q.transpose(0, -1) if q.dim() > 1 and draw(st.booleans()) else q, name


@given(codes())
def test_pack_round_trip(drawn: tuple[torch.Tensor, str]) -> None:
    q, name = drawn
    qtype = get_qtype(name)
    packed = N.pack(q, name)
    rows = q.shape or (1,)
    assert packed.dtype == torch.uint8 and packed.shape == (*rows[:-1], qtype.packed_size(rows[-1]))
    out = N.unpack(packed, name, q.shape)
    assert same(out, q) and out.is_contiguous() and packed.is_contiguous()


@given(codes())
def test_packed_bits_are_one_little_endian_stream(drawn: tuple[torch.Tensor, str]) -> None:
    q, name = drawn
    width = get_qtype(name).storage_bits
    if width >= 8 or q.dim() != 1:
        return
    stream = sum((int(v) % 2**width) << (width * i) for i, v in enumerate(q))
    assert bytes(N.pack(q, name).tolist()) == stream.to_bytes(-(-len(q) * width // 8), "little")


def test_packing_takes_half_a_byte() -> None:
    q = torch.tensor([[1, -8, 7]], dtype=torch.int8)
    assert N.pack(q, "int4").tolist() == [[0x81, 0x07]]


# -- errors ----------------------------------------------------------------------------------------


def test_errors() -> None:
    x, one = torch.randn(4, 6), torch.ones(1, 1)
    whole = (-1, -1)
    for bad in (torch.ones(()), torch.ones(4, 1), torch.ones(1)):
        with pytest.raises(SpecError, match="scale has shape"):
            N.quantize(x, bad, None, whole, "int8")
    with pytest.raises(SpecError, match=r"zero_point has shape \[4, 1\], but block \[-1, -1\]"):
        N.fake_quantize(x, one, torch.zeros(4, 1, dtype=torch.int32), whole, "int8")
    with pytest.raises(SpecError, match="block"):
        N.quantize(x, one, None, (-1,), "int8")
    with pytest.raises(SpecError, match="only floating point"):
        N.quantize(x.int(), one, None, whole, "int8")
    with pytest.raises(SpecError, match="only floating point"):
        N.choose_qparams(x > 0, whole, "int8", "symmetric")
    with pytest.raises(SpecError, match=r"held in torch\.int8"):
        N.dequantize(torch.zeros(4, 6, dtype=torch.uint8), one, None, whole, "int8")
    with pytest.raises(SpecError, match="method must be one of"):
        N.choose_qparams(x, whole, "int8", "absmax")
    with pytest.raises(SpecError, match="nf4 has no zero point"):
        N.choose_qparams(x, whole, "nf4", "asymmetric")
    with pytest.raises(UnknownNameError):
        N.quantize(x, one, None, whole, "int9")
    with pytest.raises(SpecError, match=r"held in torch\.int8"):
        N.pack(x, "int4")
    with pytest.raises(SpecError, match=r"codes \[4, 6\] pack to \[4, 3\] bytes, not \[4, 2\]"):
        N.unpack(torch.zeros(4, 2, dtype=torch.uint8), "int4", (4, 6))
    with pytest.raises(SpecError, match=r"held in torch\.uint8"):
        N.unpack(torch.zeros(4, 3, dtype=torch.int8), "int4", (4, 6))


def test_no_warnings_about_nan_casts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        N.quantize(torch.tensor([math.nan, math.inf]), torch.ones(1), None, (-1,), "int8")


def test_numpy_oracle() -> None:
    """The integer rule written once more, in numpy."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((64, 32)).astype(np.float32)
    scale = generator.uniform(0.001, 0.1, (64, 1)).astype(np.float32)
    zero_point = generator.integers(-20, 20, (64, 1)).astype(np.int32)
    q = np.clip(np.rint(x * (np.float32(1) / scale)) + zero_point, -128, 127).astype(np.int8)
    back = (q.astype(np.float32) - zero_point) * scale
    args = (torch.from_numpy(scale), torch.from_numpy(zero_point), (1, -1), "int8")
    assert np.array_equal(N.quantize(torch.from_numpy(x), *args).numpy(), q)
    assert np.array_equal(N.dequantize(torch.from_numpy(q), *args).numpy(), back.astype(np.float32))


@given(st.data())
def test_affine_qparams_accepts_any_shape(data: st.DataObject) -> None:
    qtype = get_qtype(data.draw(st.sampled_from(ALL)))
    shape = data.draw(shapes(min_side=0))
    a, b = data.draw(tensors(shape)), data.draw(tensors(shape))
    scale, zero_point = N.affine_qparams(torch.minimum(a, b), torch.maximum(a, b), qtype, data.draw(methods(qtype)))
    assert scale.shape == zero_point.shape == torch.Size(shape) and (scale > 0).all()
