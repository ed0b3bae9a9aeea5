"""Round to nearest against its definition, group by group; search; scales that are quantized themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inc_graph.errors import ConfigError
from inc_graph.ops import DEQUANTIZE
from inc_graph.options import make_algorithm
from inc_graph.packing import pack, unpack
from inc_graph.passes.qparams._double import quantize_params
from inc_graph.passes.qparams.rtn import RTN
from inc_graph.spec import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, QSpec, scale_shape
from inc_graph.weights import Codes, weight_algorithm

INTS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]
OTHERS = ["nf4", "fp4", "fp4_bnb", "fp8_e4m3", "fp8_e5m2"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 40)))
    x = normal(*shape, seed=draw(st.integers(0, 999)))
    kind = draw(st.sampled_from(["normal", "normal", "positive", "constant", "zero", "ties", "outlier"]))
    if kind == "positive":
        x = x.abs() + 0.5
    elif kind in ("constant", "zero"):
        x = torch.full_like(x, 0.0 if kind == "zero" else -0.75)
    elif kind == "ties":
        x = torch.round(4 * x) / 4
    elif kind == "outlier":
        x[0, 0] = 50.0
    return x * 2.0 ** draw(st.integers(-8, 4))


@st.composite
def granularities(draw: st.DrawFn, shape: tuple[int, ...]) -> Granularity:
    axis = draw(st.sampled_from([0, 1]))
    kind = draw(st.sampled_from(["group", "group", "whole", "channel", "tensor"]))
    if kind == "group":
        return PerGroup(draw(st.integers(1, shape[axis])), axis)
    return {"whole": PerGroup(-1, axis), "channel": PerChannel(axis), "tensor": PerTensor()}[kind]


def parts(shape: tuple[int, ...], block: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """(index of the scale, elements that share it) of each group."""
    sizes = [n if g == -1 else g for n, g in zip(shape, block, strict=True)]
    places = itertools.product(*(range(c) for c in scale_shape(shape, block)))
    return [(p, tuple(slice(i * g, (i + 1) * g) for i, g in zip(p, sizes, strict=True))) for p in places]


def error(codes: Codes, weight: Tensor) -> float:
    return float((codes.values() - weight).double().square().sum())


# --------------------------------------------------------------------------------------------------- by definition
@given(st.data())
@settings(max_examples=150)
def test_integers_are_those_of_the_definition(data: st.DataObject) -> None:
    x = data.draw(weights())
    qtype, scheme = data.draw(st.sampled_from(INTS)), data.draw(st.sampled_from(["symmetric", "asymmetric"]))
    spec = QSpec(qtype, scheme, data.draw(granularities(tuple(x.shape))))
    full = data.draw(st.booleans())
    found = RTN(full_range=full).solve(x, spec)
    low, high = int(spec.type.qmin), int(spec.type.qmax)
    half = (high - low + 1) // 2
    scale = found.scale
    assert isinstance(scale, Tensor) and scale.shape == scale_shape(x.shape, spec.block(2))
    for place, where in parts(tuple(x.shape), spec.block(2)):
        group = x[where]
        least, most = float(group.min().clamp(max=0)), float(group.max().clamp(min=0))
        top = max(-least, most)
        if scheme == "asymmetric":
            s = torch.tensor(most) - torch.tensor(least)
            s = s / (high - low) if s > 0 else torch.tensor(1.0)
            zero = int((low - torch.round(torch.tensor(least) / s)).clamp(low, high))
        else:
            s = torch.tensor(top) / (half if full else half - 1) if top else torch.tensor(1.0)
            s = -s if full and most > -least else s
            zero = low + half
        codes = (torch.round(group / s) + zero).clamp(low, high)
        assert torch.equal(found.carrier[where].float(), codes), (group, s, zero)
        assert float(scale[place]) == pytest.approx(float(s), rel=2.0**-11)
        kept = 0 if found.zero_point is None else int(found.zero_point[place])  # type: ignore[index, arg-type]
        assert kept == zero


@given(st.data(), st.sampled_from(OTHERS))
def test_other_formats_give_the_nearest_number(data: st.DataObject, qtype: str) -> None:
    x = data.draw(weights())
    spec = QSpec(qtype, "symmetric", data.draw(granularities(tuple(x.shape))))
    found = RTN().solve(x, spec)
    if spec.type.codebook is not None:
        numbers = torch.tensor(spec.type.codebook)
    else:
        numbers = torch.arange(256, dtype=torch.uint8).view(spec.type.carrier).float()
        numbers = numbers[numbers.isfinite()]
    for _, where in parts(tuple(x.shape), spec.block(2)):
        group = x[where]
        top = group.abs().max()
        scale = top / spec.type.qmax if top > 0 else torch.tensor(1.0)
        least = (group[..., None] - numbers * scale).abs().amin(-1)
        off = (found.values()[where] - group).abs()
        assert bool((off <= least + 1e-3 * top).all())  # scales are kept as float16


def test_any_rank_and_dtype() -> None:
    conv = normal(8, 10, 3, 3)
    found = RTN().solve(conv, QSpec("int4", "symmetric", PerBlock((1, 4, -1, -1))))
    assert isinstance(found.scale, Tensor) and found.scale.shape == (8, 3, 1, 1)
    tops = conv[:, 8:].abs().amax((1, 2, 3))  # the ragged last group
    torch.testing.assert_close(found.scale[:, 2, 0, 0].float(), tops / 7, rtol=1e-3, atol=0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = normal(6, 32).to(dtype)
        spec = QSpec("uint4", "asymmetric", PerGroup(16))
        assert torch.equal(RTN().solve(x, spec).carrier, RTN().solve(x.float(), spec).carrier)


def test_the_weight_is_left_alone_and_strides_do_not_matter() -> None:
    x = normal(24, 40)
    spec = QSpec("int4", "symmetric", PerGroup(8))
    for search in (False, True):
        before = x.clone()
        straight = RTN(search=search).solve(x, spec)
        turned = RTN(search=search).solve(x.T.contiguous().T, spec)
        assert torch.equal(x, before) and torch.equal(straight.carrier, turned.carrier)
        assert straight.carrier.is_contiguous() and turned.carrier.is_contiguous()


@pytest.mark.parametrize("qtype", ["int3", "uint5", "nf4", "fp8_e4m3"])
@pytest.mark.parametrize("scale_type", [None, "int8"])
def test_values_are_what_the_operators_give(qtype: str, scale_type: str | None) -> None:
    x = normal(12, 45)
    found = RTN(scale_type=scale_type).solve(x, QSpec(qtype, "symmetric", PerGroup(16)))
    carrier = unpack(pack(found.carrier, qtype), qtype, [12, 45])
    scale, zero = found.params()
    if isinstance(found.scale, Codes):
        inner = found.scale
        s, z = inner.params()
        scale = DEQUANTIZE(inner.carrier, s, z, list(inner.spec.block(2)), inner.spec.qtype, torch.float32)
        scale = scale.reshape(12, 3)
    values = DEQUANTIZE(carrier, scale, zero, [1, 16], qtype, torch.float32)
    assert torch.equal(values, found.values())


def test_error_in_the_notes() -> None:
    x = normal(16, 64)
    for options in ({}, {"search": True}, {"scale_type": "int4"}):
        found = RTN(**options).solve(x, QSpec("int4", "symmetric", PerGroup(32)))
        assert found.notes["error"] == pytest.approx(math.sqrt(error(found, x) / float(x.square().sum())), rel=2e-2)


# ---------------------------------------------------------------------------------------------------------- search
@given(st.data())
@settings(max_examples=150)
def test_search_is_never_worse(data: st.DataObject) -> None:
    x = data.draw(weights())
    qtype = data.draw(st.sampled_from(INTS + OTHERS))
    scheme = data.draw(st.sampled_from(["symmetric", "asymmetric"])) if qtype in INTS else "symmetric"
    spec = QSpec(qtype, scheme, data.draw(granularities(tuple(x.shape))))
    plain, searched = RTN().solve(x, spec), RTN(search=True).solve(x, spec)
    rounding = 1e-13 * float(x.double().square().sum())  # of a scale in float32, where plain is exact
    assert error(searched, x) <= error(plain, x) * 1.001 + rounding


@pytest.mark.parametrize(
    ("qtype", "scheme"), [("int2", "symmetric"), ("int4", "symmetric"), ("uint4", "asymmetric"), ("nf4", "symmetric")]
)
def test_search_beats_one_ratio_for_all(qtype: str, scheme: str) -> None:
    """As good as the best of 40 clipping ratios, which is what is searched elsewhere; and near the best of 200 each."""
    x = normal(64, 128) * torch.exp(0.5 * normal(64, 1, seed=1))
    spec = QSpec(qtype, scheme, PerGroup(32))
    found = error(RTN(search=True).solve(x, spec), x)
    rows, whole, best = x.reshape(-1, 32), [], torch.full((256,), torch.inf)
    top = rows.abs().amax(1, keepdim=True)
    for i in range(200):
        share = 1 - i / 250
        clipped = torch.maximum(torch.minimum(rows, top * share), -top * share)
        for marked in (clipped,):
            codes = RTN().solve(marked, QSpec(qtype, scheme, PerGroup(32)))
            off = (codes.values() - rows).square().sum(1)
            best = torch.minimum(best, off)
            whole.append(float(off.sum()))
    assert found <= min(whole[:50])
    assert found <= float(best.sum()) * 1.02


# ------------------------------------------------------------------------------------------------ quantized scales
@given(st.data())
@settings(max_examples=100)
def test_quantized_scales_are_off_by_half_a_step(data: st.DataObject) -> None:
    count, group = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([2, 16, 64, -1]))
    scales = (normal(count, seed=data.draw(st.integers(0, 99))).abs() + 0.01) * 2.0 ** data.draw(st.integers(-9, 3))
    qtype, scheme = data.draw(st.sampled_from(INTS)), data.draw(st.sampled_from(["symmetric", "asymmetric"]))
    codes = quantize_params(scales.reshape(1, -1, 1), qtype, scheme, group)
    found = codes.values().flatten()
    bits, unsigned = codes.spec.type.bits, qtype.startswith("u")
    size = count if group == -1 else group
    for start in range(0, count, size):
        want, got = scales[start : start + size], found[start : start + size]
        if scheme == "asymmetric" and unsigned:
            step = (want.max() - want.min()) / (2**bits - 1)
        elif scheme == "asymmetric":
            step = (want - scales.mean()).abs().max() / (2 ** (bits - 1) - 1)
        else:
            step = want.max() / (2**bits - 1 if unsigned else 2 ** (bits - 1) - 1)
        assert float((want - got).abs().max()) <= float(step) * 0.501 + 1e-5 * float(want.max())


def test_signs_of_quantized_scales_survive() -> None:
    x = normal(64, 64)
    found = RTN(full_range=True, scale_type="uint8", scale_scheme="symmetric").solve(
        x, QSpec("int4", "symmetric", PerGroup(32))
    )
    assert isinstance(found.scale, Codes) and bool((found.params()[0] < 0).any())
    assert found.notes["error"] < 0.12


@pytest.mark.parametrize("qtype", ["int4", "uint4", "nf4"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale_type": "int8"},
        {"scale_type": "int8", "scale_scheme": "symmetric", "scale_group": 7},
        {"scale_type": "uint6", "scale_group": -1},
        {"scale_type": "nf4", "scale_scheme": "symmetric"},
    ],
)
def test_weights_are_rounded_by_the_scales_that_remain(qtype: str, options: dict[str, object]) -> None:
    x = normal(32, 96) * torch.exp(normal(32, 1, seed=3))
    spec = QSpec(qtype, "asymmetric" if qtype == "uint4" else "symmetric", PerGroup(32))
    found = RTN(**options).solve(x, spec)  # type: ignore[arg-type]
    plain = RTN().solve(x, spec)
    assert isinstance(found.scale, Codes) and found.scale.carrier.shape == (1, 96)
    mixed = Codes(plain.carrier, found.scale, plain.zero_point, spec)
    assert error(found, x) <= error(mixed, x)
    if options["scale_type"] == "int8":
        assert error(found, x) <= error(plain, x) * 1.1


# ------------------------------------------------------------------------------------------------------- bad input
def test_bad_input() -> None:
    x = normal(8, 16)
    with pytest.raises(ConfigError, match=r"group size 32 .* 16"):
        RTN().solve(x, QSpec("int4", "symmetric", PerGroup(32)))
    with pytest.raises(ConfigError, match="int16"):
        RTN().solve(x, QSpec("int16"))
    with pytest.raises(ConfigError, match="mxfp4"):
        RTN().solve(x, QSpec("mxfp4", "symmetric", PerGroup(8)))
    with pytest.raises(ConfigError, match="no elements"):
        RTN().solve(x[:0], QSpec("int4"))
    with pytest.raises(ConfigError, match="zero point"):
        RTN(scale_type="nf4")
    with pytest.raises(ConfigError, match="scale_group"):
        RTN(scale_type="int8", scale_group=0)
    with pytest.raises(ConfigError, match="scale_scheme"):
        RTN(scale_type="int8", scale_scheme="sym")
    with pytest.raises(ConfigError, match="no option"):
        weight_algorithm("rtn", serch=True)


def test_options_as_text() -> None:
    text = "rtn{full_range=true, scale_type=int4, scale_group=64}"
    assert make_algorithm(text) == RTN(full_range=True, scale_type="int4", scale_group=64)
