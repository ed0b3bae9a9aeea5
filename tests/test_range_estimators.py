"""Each range estimator against its definition, other implementations and awkward data."""

from __future__ import annotations

import time

import pytest
import torch
import torch.ao.quantization as tq

from inc_graph.calibrate import RangeEstimator, State, estimator
from inc_graph.errors import CalibrationError, ConfigError, UnknownNameError
from inc_graph.numerics import fake_quantize
from inc_graph.passes.qparams._histogram import bins_of
from inc_graph.passes.qparams._search import range_error
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import PerChannel, PerTensor, QSpec

STREAMING = ["minmax", "moving_average", "percentile", "histogram_mse", "kl"]
ALL = [*STREAMING, "mse"]
U8, S8 = QSpec("uint8", "asymmetric"), QSpec("int8", "symmetric")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(e: RangeEstimator, data: list[torch.Tensor], qspec: QSpec) -> State:
    state = e.init(qspec, data[0].ndim)
    for x in data:
        state = e.collect(state, x)
    return state


def mse(x: torch.Tensor, qparams: tuple[torch.Tensor, torch.Tensor], qspec: QSpec) -> float:
    return float((fake_quantize(x, *qparams, qspec.block(x.ndim), qspec.qtype) - x).double().square().mean())


DATA = {
    "normal": normal(20000),
    "relu": normal(20000).relu(),
    "relu6": (4 * normal(20000)).clamp(0, 6),
    "silu": torch.nn.functional.silu(3 * normal(20000)),
    "gelu": torch.nn.functional.gelu(normal(20000)),
    "laplace": torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(20000, generator=torch.Generator().manual_seed(1))
    ),
    "outliers": torch.cat([normal(20000), torch.tensor([40.0, -25.0])]),
    "sigmoid": torch.sigmoid(2 * normal(20000)),
}


def test_all_are_registered_by_name() -> None:
    for name in ALL:
        cls = ALGORITHMS.get(name)
        assert issubclass(cls, RangeEstimator) and cls.name == name and estimator(name) == cls()
        assert cls.__doc__ and hash(cls()) == hash(cls())


def test_options_are_checked() -> None:
    assert estimator("percentile", percent=99.9).percent == 99.9  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"no option 'percnt'(.|\n)*valid options: bins, percent"):
        estimator("percentile", percnt=99.9)
    with pytest.raises(ConfigError, match=r"no option 'bins'(.|\n)*it has no options"):
        estimator("minmax", bins=3)
    with pytest.raises(UnknownNameError, match="did you mean 'minmax'"):
        estimator("min_max")
    for name, options in [
        ("percentile", {"percent": 40}), ("percentile", {"percent": 101}), ("moving_average", {"momentum": 0}),
        ("moving_average", {"momentum": 1.5}), ("kl", {"bins": 2}), ("kl", {"bins": 1000}),
        ("histogram_mse", {"bins": 2.5}),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(options))):
            estimator(name, **options)


def test_an_algorithm_of_another_kind_is_refused() -> None:
    ALGORITHMS.add("not_a_range", object())
    try:
        with pytest.raises(ConfigError, match=r"does not estimate ranges(.|\n)*histogram_mse"):
            estimator("not_a_range")
    finally:
        ALGORITHMS.remove("not_a_range")


# ------------------------------------------------------------------------------------------------- differential
TORCH_SPECS = [
    (QSpec("int8", "symmetric"), torch.qint8, torch.per_tensor_symmetric),
    (QSpec("int8", "asymmetric"), torch.qint8, torch.per_tensor_affine),
    (QSpec("uint8", "asymmetric"), torch.quint8, torch.per_tensor_affine),
    (QSpec("uint8", "symmetric"), torch.quint8, torch.per_tensor_symmetric),
    (QSpec("uint7", "asymmetric"), torch.quint8, torch.per_tensor_affine),
]


@pytest.mark.parametrize("qspec, dtype, scheme", TORCH_SPECS, ids=lambda v: str(v))
@pytest.mark.parametrize("kind", sorted(DATA))
def test_minmax_is_torchs(kind: str, qspec: QSpec, dtype: torch.dtype, scheme: torch.qscheme) -> None:
    theirs = tq.MinMaxObserver(dtype=dtype, qscheme=scheme, reduce_range="7" in qspec.qtype)
    data = [part * (i + 1) for i, part in enumerate(DATA[kind].split(7000))]
    for x in data:
        theirs(x)
    scale, zero_point = estimator("minmax").solve(run(estimator("minmax"), data, qspec), qspec)
    want_scale, want_zero_point = theirs.calculate_qparams()
    torch.testing.assert_close(scale, want_scale, rtol=2e-7, atol=0)
    assert int(zero_point) == int(want_zero_point)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_per_channel_is_torchs(axis: int, symmetric: bool) -> None:
    scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    theirs = tq.PerChannelMinMaxObserver(ch_axis=axis % 4, dtype=torch.qint8, qscheme=scheme)
    qspec = QSpec("int8", "symmetric" if symmetric else "asymmetric", PerChannel(axis))
    data = [normal(4, 5, 6, 7, seed=i) * (i + 1) + 0.3 for i in range(3)]
    for x in data:
        theirs(x)
    scale, zero_point = estimator("minmax").solve(run(estimator("minmax"), data, qspec), qspec)
    want = theirs.calculate_qparams()
    assert list(scale.shape) == [n if d == axis % 4 else 1 for d, n in enumerate((4, 5, 6, 7))]
    torch.testing.assert_close(scale.flatten(), want[0], rtol=2e-7, atol=0)
    assert torch.equal(zero_point.flatten().long(), want[1].long())


@pytest.mark.parametrize("kind", sorted(DATA))
def test_histogram_mse_beats_torchs_histogram_and_minmax(kind: str) -> None:
    x, theirs = DATA[kind], tq.HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    theirs(x)
    s, z = theirs.calculate_qparams()
    ours = mse(x, estimator("histogram_mse").estimate(x, U8), U8)
    assert ours <= mse(x, (s, z.int()), U8) * 1.02
    assert ours <= mse(x, estimator("minmax").estimate(x, U8), U8) * 1.005  # the histogram is not the data


@pytest.mark.parametrize("qtype", ["int8", "uint8", "int4", "uint4", "int3", "int2"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", ["normal", "silu", "outliers"])
def test_search_is_near_the_best_of_a_dense_search(kind: str, scheme: str, qtype: str) -> None:
    qspec, e = QSpec(qtype, scheme), estimator("histogram_mse", bins=256)
    state = run(e, [DATA[kind]], qspec)
    bins, unit = bins_of(state), 2.0 ** float(bins_of(state).unit)
    grid = torch.linspace(0.01, 1, 70)
    a, b = torch.cartesian_prod(grid, grid).T
    dense = range_error(bins.values, bins.counts, (bins.low * a)[None], (bins.high * b)[None], qspec).min()
    ends = [(end / unit)[None] for end in e.limits(state, qspec)]
    assert float(range_error(bins.values, bins.counts, *ends, qspec)) <= float(dense) * 1.03


def test_the_search_measures_what_the_reference_does() -> None:
    x = DATA["silu"][None]
    for qspec in (U8, S8, QSpec("uint4", "asymmetric"), QSpec("fp8_e4m3"), QSpec("nf4"), QSpec("int16")):
        e = estimator("minmax")
        want = mse(x, e.estimate(x, qspec), qspec) * x.numel()
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        got = float(range_error(x, None, low, high, qspec, exact=True))
        assert got == pytest.approx(want, rel=1e-6), qspec


@pytest.mark.parametrize("kind", sorted(DATA))
def test_mse_of_the_values_is_at_least_as_good_as_of_the_histogram(kind: str) -> None:
    x = DATA[kind]
    exact, binned = (mse(x, estimator(n).estimate(x, S8), S8) for n in ("mse", "histogram_mse"))
    assert exact <= binned * 1.005


def test_moving_average_is_the_weighted_mean_of_the_ranges() -> None:
    e, data = estimator("moving_average", momentum=0.25), [normal(50, seed=i) * (i + 1) for i in range(5)]
    weights = torch.tensor([0.75 ** (4 - i) for i in range(5)], dtype=torch.float64)
    want = [
        float(sum(w * f(x).double() for w, x in zip(weights, data, strict=True)) / weights.sum())
        for f in (torch.amin, torch.amax)
    ]
    low, high = e.limits(run(e, data, U8), U8)
    assert [float(low), float(high)] == pytest.approx(want, rel=1e-6)
    assert torch.equal(e.solve(run(e, data[:1], U8), U8)[0], estimator("minmax").estimate(data[0], U8)[0])
    last = estimator("moving_average", momentum=1.0)
    assert torch.equal(last.solve(run(last, data, U8), U8)[0], estimator("minmax").estimate(data[-1], U8)[0])


def test_percentile_of_known_data() -> None:
    x = torch.arange(1, 10001) / 100.0  # 0.01 .. 100
    low, high = (
        float(v)
        for v in estimator("percentile", percent=99).limits(run(estimator("percentile", percent=99), [x], U8), U8)
    )
    assert low == 0.0 and high == pytest.approx(99, abs=0.07)
    e = estimator("percentile", percent=90)
    low, high = (float(v) for v in e.limits(run(e, [x - 50], U8), U8))
    assert (low, high) == (pytest.approx(-40, abs=0.07), pytest.approx(40, abs=0.07))
    low, high = (float(v) for v in e.limits(run(e, [x - 50], S8), S8))
    assert -low == high == pytest.approx(45, abs=0.07)
    mostly_zero = torch.cat([torch.zeros(1000), torch.tensor([1.0])])
    assert float(e.limits(run(e, [mostly_zero], U8), U8)[1]) == 0.0


# ------------------------------------------------------------------------------------------------------------- KL
@pytest.mark.parametrize("qspec", [S8, U8, QSpec("int8", "asymmetric"), QSpec("int7", "symmetric")], ids=str)
def test_kl_clips_the_outliers_of_a_gaussian(qspec: QSpec) -> None:
    x = torch.cat([normal(100_000), torch.tensor([30.0, -30.0, 28.0])])
    low, high = (float(v) for v in estimator("kl").limits(run(estimator("kl"), [x], qspec), qspec))
    assert 2.5 < high < 8 and -8 < low < -2.5
    y = torch.cat([normal(100_000).relu(), torch.tensor([30.0])])
    low, high = (float(v) for v in estimator("kl").limits(run(estimator("kl"), [y], qspec), qspec))
    assert low == 0.0 and 2.5 < high < 8


def published_kl(counts: torch.Tensor, levels: int) -> int:
    """The procedure of the slides, in loops: the number of bins to keep of a histogram of magnitudes."""
    best, best_kept = float("inf"), len(counts)
    for kept in range(levels, len(counts) + 1):
        p = counts[:kept].clone()
        p[-1] += counts[kept:].sum()
        level = ((torch.arange(kept) + 0.5) * levels / kept).long()
        q = torch.zeros(kept, dtype=torch.float64)
        for i in range(levels):
            cell = (level == i) & (counts[:kept] > 0)
            if cell.any():
                q[cell] = counts[:kept][level == i].sum() / cell.sum()
        p, q = p / p.sum(), (q / q.sum()).clamp(min=1e-6)
        divergence = float((p * (p.clamp(min=1e-30) / q).log())[p > 0].sum())
        if divergence < best:
            best, best_kept = divergence, kept
    return best_kept


def test_kl_agrees_with_the_published_procedure() -> None:
    # the last bins of magnitudes below 16 are in use; 16 levels of a 4-bit unsigned format
    x = torch.cat([normal(50_000).abs(), torch.tensor([15.9, 12.0])])
    qspec, e = QSpec("uint4", "asymmetric"), estimator("kl", bins=128)
    state = run(e, [x], qspec)
    ours = float(e.limits(state, qspec)[1])
    theirs = published_kl(state["counts"][0, 128:].double(), 16) * 2.0 ** int(state["exponent"])
    assert ours == pytest.approx(
        theirs, rel=0.15
    )  # levels at multiples of the scale here, in the middle of cells there


def test_kl_keeps_everything_where_nothing_can_be_gained() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert float(estimator("kl").limits(run(estimator("kl"), [x], U8), U8)[1]) > 0.97
    wide = QSpec("int16", "symmetric")
    assert torch.equal(estimator("kl").estimate(x, wide)[0], estimator("minmax").estimate(x, wide)[0])
    with pytest.raises(ConfigError, match="integer"):
        estimator("kl").estimate(x, QSpec("fp8_e4m3"))


# ---------------------------------------------------------------------------------------------------- awkward data
@pytest.mark.parametrize(
    "qspec", [U8, S8, QSpec("int8", "asymmetric"), QSpec("uint8", "asymmetric", PerChannel(0))], ids=str
)
@pytest.mark.parametrize("name", ALL)
def test_awkward_data(name: str, qspec: QSpec) -> None:
    e = estimator(name)
    zeros = e.estimate(torch.zeros(2, 8), qspec)
    assert bool((zeros[0] == 1).all())
    for value in (3.0, -3.0, 1e-3, 6.0):
        x = torch.full((2, 8), value)
        scale, zero_point = e.estimate(x, qspec)
        out = fake_quantize(x, scale, zero_point, qspec.block(2), qspec.qtype)
        assert float((out - x).abs().max()) <= abs(value) / 200
    for magnitude in (1e-38, 1e-30, 1e30, 1e38):
        x = torch.tensor([[0.5, -1.0, 0.25, 1.0], [1.0, 1.0, -1.0, 0.0]]) * magnitude
        scale, zero_point = e.estimate(x, qspec)
        assert bool((scale.isfinite() & (scale > 0)).all())
        if magnitude > 1e-32:  # below, the least scale decides
            out = fake_quantize(x, scale, zero_point, qspec.block(2), qspec.qtype)
            assert float(((out - x) / magnitude).abs().max()) < 0.02
    scale, zero_point = e.estimate(torch.tensor([[2.5]]), qspec)
    out = fake_quantize(torch.tensor([[2.5]]), scale, zero_point, qspec.block(2), qspec.qtype)
    assert float(out) == pytest.approx(2.5, rel=0.01)


@pytest.mark.parametrize("name", STREAMING)
def test_float_dtypes_scalars_and_layouts(name: str) -> None:
    e, x = estimator(name), (normal(2, 3, 4, 5) * 64).round() / 64  # exact in every dtype
    want = e.estimate(x, U8)
    for other in (x.half(), x.bfloat16().float().double(), x.double(), x.to(memory_format=torch.channels_last)):
        if not torch.equal(other.float(), x):
            continue
        got = e.estimate(other, U8)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    scale, zero_point = e.estimate(torch.tensor(4.0), U8)
    assert scale.shape == zero_point.shape == ()
    scale, _ = e.estimate(x.transpose(1, 3), QSpec("int8", "symmetric", PerChannel(1)))
    assert scale.shape == (1, 5, 1, 1)


@pytest.mark.parametrize("name", ["histogram_mse", "kl", "percentile", "mse"])
def test_clamp_values_and_zeros_stay_exact(name: str) -> None:
    x = DATA["relu6"]
    scale, zero_point = estimator(name).estimate(x, U8)
    assert int(zero_point) == 0 and 255 * float(scale) == pytest.approx(6, rel=2e-3)


def test_a_state_is_small_and_does_not_grow() -> None:
    for name in STREAMING:
        e = estimator(name)
        sizes = [sum(v.numel() * v.element_size() for v in run(e, [normal(100)] * n, U8).values()) for n in (1, 20)]
        assert sizes[0] == sizes[1] < 40_000


def test_the_histogram_counts_exactly() -> None:
    e = estimator("histogram_mse", bins=64)
    x = torch.tensor([0.0, -0.0, 6.0, 5.999, 1.0, -1.0, -1.001, 0.05, -0.05])
    x = torch.cat([x, torch.tensor([-1e-40, 1e-40, -6.0])])
    units = x[x != 0].double() * 8  # 64 bins up to 8
    want = torch.bincount(torch.where(units > 0, 64 + units.floor(), 63 - (-units).floor()).long(), minlength=128)
    for qspec, data in ((U8, x), (QSpec("uint8", "asymmetric", PerChannel(0)), torch.stack([x, x]))):
        state = run(e, [data], qspec)
        assert bool((state["exponent"] == -3).all()) and bool((state["zeros"] == 2).all())
        assert all(torch.equal(row, want) for row in state["counts"])
    for data, used in ((x.abs(), slice(64, 128)), (-x.abs(), slice(0, 64))):
        counts = run(e, [data], U8)["counts"][0]
        assert torch.equal(
            counts[used], (want[64:] + want[:64].flip(0)) if used.start else want[64:].flip(0) + want[:64]
        )
        assert int(counts.sum()) == len(units)


def test_what_cannot_be_collected() -> None:
    e = estimator("minmax")
    with pytest.raises(CalibrationError, match="saw no data"):
        e.solve(e.init(U8, 2), U8)
    with pytest.raises(CalibrationError, match="saw no data"):
        e.estimate(torch.zeros(0, 3), U8)
    with pytest.raises(CalibrationError, match="2 NaN and 1 infinite values of 4"):
        e.estimate(torch.tensor([float("nan"), float("nan"), float("-inf"), 0.0]), U8)
    with pytest.raises(CalibrationError, match="infinite"):
        e.estimate(torch.tensor([1e300], dtype=torch.float64), U8)
    with pytest.raises(CalibrationError, match=r"3 dimensions \[1, 2, 3\], and had 2 before"):
        e.collect(e.init(U8, 2), torch.zeros(1, 2, 3))
    per_channel = QSpec("int8", "symmetric", PerChannel(1))
    state = e.collect(e.init(per_channel, 2), torch.ones(3, 4))
    with pytest.raises(CalibrationError, match=r"\[1, 4\] before, and now \[1, 5\]"):
        e.collect(state, torch.ones(3, 5))
    with pytest.raises(CalibrationError, match="do not merge"):
        e.merge(state, e.collect(e.init(per_channel, 2), torch.ones(3, 5)))
    with pytest.raises(CalibrationError, match="do not merge"):
        e.merge(state, e.init(U8, 2))
    with pytest.raises(CalibrationError, match="bins do not merge"):
        estimator("kl").merge(estimator("kl").init(U8, 1), estimator("kl", bins=64).init(U8, 1))
    with pytest.raises(CalibrationError, match="second"):
        run(estimator("mse"), [torch.ones(2), torch.ones(2)], S8)
    with pytest.raises(ConfigError, match="dynamic"):
        e.init(QSpec("int8", "symmetric", PerTensor(), True), 2)


@pytest.mark.alone
def test_the_search_is_fast() -> None:
    e, x, threads = estimator("histogram_mse"), DATA["normal"], torch.get_num_threads()
    state, best = run(e, [x], U8), float("inf")
    torch.set_num_threads(1)  # processor time of one thread does not depend on what else runs
    try:
        for _ in range(10):
            start = time.process_time()
            e.solve(state, U8)
            best = min(best, time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert best < 0.02
