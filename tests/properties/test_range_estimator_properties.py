"""Laws of the range estimators, over drawn data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inc_graph.calibrate import RangeEstimator, State, blocks, estimator
from inc_graph.numerics import affine_qparams, fake_quantize
from inc_graph.passes.qparams._histogram import bins_of
from inc_graph.passes.qparams._search import range_error
from inc_graph.spec import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, scale_shape

ESTIMATORS = {
    "minmax": estimator("minmax"),
    "moving_average": estimator("moving_average", momentum=0.3),
    "percentile": estimator("percentile", percent=99.0, bins=128),
    "histogram_mse": estimator("histogram_mse", bins=128),
    "kl": estimator("kl", bins=128),
}
BINS = {name: {"bins": 128} for name in ("percentile", "histogram_mse", "kl")}
names = st.sampled_from(sorted(ESTIMATORS))
orderless = st.sampled_from(sorted(set(ESTIMATORS) - {"moving_average"}))
qspecs = st.builds(
    QSpec,
    st.sampled_from(["int8", "uint8", "int7", "uint7", "int4", "uint4", "int2", "int16"]),
    st.sampled_from(["symmetric", "asymmetric"]),
    st.sampled_from([PerTensor(), PerChannel(0), PerChannel(-1)]),
)


@st.composite
def batches(draw: st.DrawFn, count: int = 3) -> list[torch.Tensor]:
    """Batches of one layout [n, 3], each with its own distribution and magnitude."""
    made = []
    for _ in range(draw(st.integers(1, count))):
        gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        x = torch.randn(4, 3, generator=gen)
        shape = draw(st.sampled_from(["normal", "positive", "negative", "clamped", "zero", "constant", "outlier"]))
        x = {
            "normal": x,
            "positive": x.relu(),
            "negative": -x.abs(),
            "clamped": (6 * x).clamp(0, 6),
            "zero": torch.zeros_like(x),
            "constant": torch.full_like(x, 0.7),
            "outlier": x * torch.tensor([1.0, 1.0, 100.0]),
        }[shape]
        made.append(x * 2.0 ** draw(st.sampled_from([-130, -20, -1, 0, 3, 100])))
    return made


def run(e: RangeEstimator, data: list[torch.Tensor], qspec: QSpec) -> State:
    state = e.init(qspec, data[0].ndim)
    for x in data:
        state = e.collect(state, x)
    return state


def same(a: State, b: State, exact: bool = True) -> bool:
    close = torch.equal if exact else (lambda u, v: torch.allclose(u.double(), v.double(), rtol=1e-12, atol=0))
    return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)


@settings(max_examples=60)
@given(names, batches(), batches(), qspecs)
def test_merging_is_collecting(name: str, a: list[torch.Tensor], b: list[torch.Tensor], qspec: QSpec) -> None:
    e = ESTIMATORS[name]
    merged = e.merge(run(e, a, qspec), run(e, b, qspec))
    assert same(merged, run(e, a + b, qspec), exact=name != "moving_average")


@settings(max_examples=40)
@given(orderless, batches(4), qspecs, st.randoms())
def test_order_and_grouping_do_not_matter(name: str, data: list[torch.Tensor], qspec: QSpec, rng) -> None:
    e = ESTIMATORS[name]
    shuffled = rng.sample(data, len(data))
    assert same(run(e, data, qspec), run(e, shuffled, qspec))
    if qspec.granularity != PerChannel(0) or len(data) == 1:
        assert same(run(e, data, qspec), run(e, [torch.cat(data)], qspec))


@given(names, batches(), qspecs)
def test_the_empty_state_is_neutral(name: str, data: list[torch.Tensor], qspec: QSpec) -> None:
    e = ESTIMATORS[name]
    state, empty = run(e, data, qspec), e.init(qspec, 2)
    assert e.is_empty(empty) and not e.is_empty(state)
    assert same(e.merge(empty, state), state) and same(e.merge(state, empty), state)
    assert same(e.collect(state, data[0][:0]), state) or qspec.granularity == PerChannel(0)


@settings(max_examples=80)
@given(names, batches(), qspecs)
def test_the_result_is_usable(name: str, data: list[torch.Tensor], qspec: QSpec) -> None:
    e = ESTIMATORS[name]
    state = run(e, data, qspec)
    before = {key: value.clone() for key, value in state.items()}
    scale, zero_point = e.solve(state, qspec)
    assert same(state, before)
    block = qspec.block(2)
    assert scale.shape == zero_point.shape == scale_shape(data[0].shape, block)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert bool(((scale > 0) & scale.isfinite()).all())
    assert bool(((zero_point >= qspec.type.qmin) & (zero_point <= qspec.type.qmax)).all())
    zero = torch.zeros_like(data[0])
    assert torch.equal(fake_quantize(zero, scale, zero_point, block, qspec.qtype), zero)
    low, high = e.limits(state, qspec)
    reach = torch.maximum(state["max"], -state["min"]) * 1.021
    assert bool((low >= -reach).all() and (high <= reach).all())


@settings(max_examples=60)
@given(batches(), qspecs)
def test_mse_is_never_worse_than_minmax(data: list[torch.Tensor], qspec: QSpec) -> None:
    e = ESTIMATORS["histogram_mse"]
    state = run(e, data, qspec)
    bins = bins_of(state)
    ends = [(state["min"], state["max"]), e.limits(state, qspec)]
    unit = torch.exp2(bins.unit.double())
    errors = []
    for low, high in ends:
        low, high = ((end.flatten().double() / unit).float()[:, None] for end in (low, high))
        errors.append(range_error(bins.values, bins.counts, low, high, qspec, exact=True)[:, 0])
    assert bool((errors[1] <= errors[0] * (1 + 1e-12)).all())

    x = data[0]
    block = qspec.block(2)
    full, best = (estimator(n).estimate(x, qspec) for n in ("minmax", "mse"))
    scaled = x.double().abs().max().clamp(min=1e-300)
    error = [
        ((fake_quantize(x, *q, block, qspec.qtype).double() - x.double()) / scaled).square().sum() for q in (full, best)
    ]
    assert error[1] <= error[0] * (1 + 1e-6)


@settings(max_examples=40)
@given(batches(), qspecs)
def test_percentile_100_is_minmax(data: list[torch.Tensor], qspec: QSpec) -> None:
    e = estimator("percentile", percent=100, bins=64)
    got = e.solve(run(e, data, qspec), qspec)
    want = estimator("minmax").solve(run(estimator("minmax"), data, qspec), qspec)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@settings(max_examples=40)
@given(batches(), st.sampled_from([51.0, 75.0, 90.0, 99.0]), st.sampled_from(["symmetric", "asymmetric"]))
def test_percentile_leaves_out_what_it_says(data: list[torch.Tensor], percent: float, scheme: str) -> None:
    e = estimator("percentile", percent=percent, bins=256)
    qspec = QSpec("int8", scheme)
    state = run(e, data, qspec)
    low, high = e.limits(state, qspec)
    x = torch.cat(data)
    allowed = x.numel() * (1 - percent / 100) + 1e-6
    width = 2.0 ** int(state["exponent"]) if int(state["exponent"]) > -1100 else 0.0
    if scheme == "symmetric":
        assert int((x.abs() > high).sum()) <= allowed
        assert float(high) <= width or int((x.abs() >= high - width).sum()) >= allowed
    else:
        assert int((x > high).sum()) <= allowed and int((x < low).sum()) <= allowed
        assert float(high) <= width or int((x >= high - width).sum()) >= allowed
        assert float(low) >= -width or int((x <= low + width).sum()) >= allowed


@settings(max_examples=30)
@given(st.integers(0, 99), st.sampled_from(["histogram_mse", "kl", "percentile", "mse"]), qspecs)
def test_the_search_does_not_depend_on_the_unit(seed: int, name: str, qspec: QSpec) -> None:
    x, e = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)), estimator(name, **BINS.get(name, {}))
    scale, zero_point = e.estimate(x, qspec)
    for shift in (-40, 3, 40):
        moved, moved_zero_point = e.estimate(x * 2.0**shift, qspec)
        assert torch.equal(moved, scale * 2.0**shift) and torch.equal(moved_zero_point, zero_point)


@settings(max_examples=40)
@given(batches(1), st.sampled_from(["minmax", "histogram_mse", "kl", "percentile", "mse"]), st.sampled_from([0, 1]))
def test_channels_are_independent(data: list[torch.Tensor], name: str, axis: int) -> None:
    x, e = data[0], estimator(name, **BINS.get(name, {}))
    per_channel = QSpec("uint8", "asymmetric", PerChannel(axis))
    got = e.estimate(x, per_channel)
    for i, channel in enumerate(x.unbind(axis)):
        want = e.estimate(channel, QSpec("uint8", "asymmetric"))
        assert math.isclose(float(got[0].flatten()[i]), float(want[0]), rel_tol=1e-6 if name == "minmax" else 0.02)
        if name in ("minmax", "percentile"):
            assert int(got[1].flatten()[i]) == int(want[1])


@given(
    st.lists(st.integers(1, 7), min_size=0, max_size=3).flatmap(
        lambda shape: st.tuples(
            st.just(shape), st.lists(st.sampled_from([-1, 1, 2, 3]), min_size=len(shape), max_size=len(shape))
        )
    )
)
def test_blocks_agree_with_the_reference_layout(case: tuple[list[int], list[int]]) -> None:
    shape, block = case
    x = torch.randn(shape)
    rows = blocks(x, block)
    assert rows.shape[0] == math.prod(scale_shape(shape, block))
    absmax = rows.abs().amax(1).reshape(scale_shape(shape, block))
    scale, zero_point = affine_qparams(-absmax, absmax, "int8")
    assert torch.allclose(fake_quantize(x, scale, zero_point, block, "int8"), x, atol=float(scale.max()))
    assert torch.isclose(rows.sum(), x.sum(), atol=1e-4)


@pytest.mark.parametrize("granularity", [PerGroup(4), PerGroup(5), PerBlock((2, -1)), PerBlock((3, 4))])
@pytest.mark.parametrize("name", ["minmax", "percentile", "histogram_mse", "kl", "mse"])
def test_groups_work_too(name: str, granularity) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    qspec = QSpec("int4", "symmetric", granularity)
    scale, zero_point = estimator(name).estimate(x, qspec)
    block = qspec.block(2)
    assert scale.shape == scale_shape(x.shape, block)
    assert float((fake_quantize(x, scale, zero_point, block, "int4") - x).abs().max()) < 1.0
