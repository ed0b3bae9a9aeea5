"""SmoothQuant as a pass: the float function stays, weights that are shared stay one, and ranges are those after it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.calibrate import Observer
from inc_graph.channel_stats import CALLS, ROWS, ChannelObserver, Recalls
from inc_graph.errors import CalibrationError, ConfigError
from inc_graph.graph import clone, get_attr, get_level, peek_meta
from inc_graph.passes.qparams.smooth import candidates, search, smooth_scale
from inc_graph.passmanager import Pipeline
from inc_graph.smooth_report import SmoothLine
from inc_graph.smoothing import Smoothing
from tests.golden_check import check_golden
from tests.passes.pipelines import INT8, WEIGHT_ONLY, name, run, text
from tests.smooth_models import PREPARE, Gated, outliers, plan, smoothed, watched

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) * outliers(8)
AUTO = Smoothing(alpha="auto")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.norm(x))))


class Once(nn.Module):
    """One layer, called twice; and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.d(F.relu(self.c(F.relu(self.a(x)))))


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("model", [Pair, Gated])
def test_golden(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    gm = watched(model(), X)
    check_golden(f"smooth-quant/{model.__name__}-watched.txt", text(gm))
    done, _ = smoothed(gm, X)
    check_golden(f"smooth-quant/{model.__name__}.txt", text(done))


def test_the_range_behind_a_scale_is_that_of_scaled_data() -> None:
    torch.manual_seed(0)
    model = Pair()
    gm = watched(model, X, recipe=plan(Smoothing(alpha=1.0)))
    done, report = smoothed(gm, X)
    observers = [get_attr(done, n.target) for n in done.graph.find_nodes(op="call_module")]
    assert get_level(done) == "observed" and all(isinstance(o, Observer) for o in observers)
    # at alpha = 1 every channel ends at 1 in absolute value
    assert [float(torch.maximum(-o.state["min"], o.state["max"])) for o in observers] == pytest.approx([1, 1], abs=1e-5)
    assert [line.by for line in report] == ["absorbed", "absorbed"]


def test_shared_weights_stay_one() -> None:
    torch.manual_seed(0)
    model = Once()
    gm = watched(model, X, recipe=plan(Smoothing(alpha=0.7, scale_sharing=True)))
    done, report = smoothed(gm, X)
    assert same(done(X), model(X))
    weights = {id(get_attr(done, n.args[1].target)) for n in done.graph.nodes if "linear" in str(n.target)}
    assert len(weights) == 3  # a's, that of b and c, and d's
    scales = {line.layers[0]: line.largest for line in report}
    assert scales["b"] == scales["c"] != scales["a"] == scales["d"]  # c gives what d reads, as b what a reads


def test_a_table_that_an_output_layer_reads_too_is_copied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.fc(self.table(ids)).tanh())

    model, ids = Tied(), torch.arange(9).view(3, 3)
    before = model.table.weight.clone()
    gm = watched(model, ids, recipe=plan(Smoothing(alpha=0.7), INT8, name("head$")))
    done, (line,) = smoothed(gm, ids)
    assert same(done(ids), model(ids)) and torch.equal(model.table.weight, before)
    assert line.by == "absorbed" and line.takers == ("table",) and "linear_1 reads too" in line.detail


def test_a_table_and_a_head_that_are_scaled_differently_are_two_and_said_so() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc, self.norm = nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8)
            self.head = nn.Linear(8, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.fc(self.table(ids))))

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(9).view(3, 3)
    gm = watched(model, ids, recipe=plan(Smoothing(alpha=0.7)))
    done, (first, second) = smoothed(gm, ids)
    assert same(done(ids), model(ids))
    assert first.takers == ("table",) and "which linear_1 reads too" in first.detail
    assert second.takers == ("norm",) and "which embedding reads too" in second.detail


def test_a_norm_with_one_plus_its_weight_takes_the_scale() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.rand(8)), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.w.float()))

    torch.manual_seed(0)
    model = Plus()
    gm = watched(model, X, recipe=plan(Smoothing(alpha=0.7, folding=True)))
    done, (line,) = smoothed(gm, X)
    assert same(done(X), model(X)) and line.by == "absorbed"
    assert "aten.add" not in text(done).split("rsqrt")[1], "1 + w is computed once"


def test_layers_multiply_for_themselves_or_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    torch.manual_seed(0)
    gm = watched(Two(), X)
    _, apart = smoothed(gm, X)
    assert [line.layers for line in apart] == [("a",), ("b",)]
    _, together = smoothed(watched(Two(), X, recipe=plan(Smoothing(scale_sharing=True))), X)
    assert [line.layers for line in together] == [("a", "b")]


def test_other_rules_keep_their_method_and_are_smoothed() -> None:
    """A rule that smooths gives way in quantizing only where `recipe.claims` says so; here one rule is weight-only."""
    for what in (WEIGHT_ONLY, replace(INT8, bias_correction=True), replace(INT8, act_algorithm="percentile")):
        torch.manual_seed(0)
        model = Pair()
        done, report = smoothed(watched(model, X, recipe=plan(AUTO, what)), X)
        assert same(done(X), model(X)) and len(report) == 2
        assert all(line.error is None or line.error <= (line.plain or 0) for line in report)


def test_nothing_to_smooth() -> None:
    gm = watched(Pair(), X, recipe=replace(plan(), rules=(replace(plan().rules[0], what=INT8),)))
    assert not any(isinstance(m, ChannelObserver) for m in gm.modules())
    before = text(gm)
    result = run(clone(gm), "smooth-quant")
    assert text(result.graph) == before and not result.reports[0].matched


def test_without_data() -> None:
    gm = clone(watched(Pair(), X))
    for module in gm.modules():
        if isinstance(module, ChannelObserver):
            module.reset()
    before = text(gm)
    with pytest.raises(CalibrationError, match=r"saw no data.*\n.*run calibration data") as e:
        run(gm, "smooth-quant")
    assert e.value.node == "linear" and e.value.module == "fc1" and text(gm) == before


def test_fuel(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = watched(Pair(), X)
    monkeypatch.setenv("INC_FUEL", "1")
    _, report = smoothed(gm, X)
    assert [line.by for line in report].count("absorbed") == 1


# ----------------------------------------------------------------------------------------------------- the observer
def test_rows_are_kept_evenly() -> None:
    watch = ChannelObserver(-1, samples=100)
    rows = torch.arange(3000.0).view(3, 1000, 1)
    for x in rows:
        watch(x.view(10, 100, 1))
    for half in (0, 1):
        (kept,) = watch.kept(half)
        steps = [
            int(n) for n in kept.flatten().diff().unique() if n < 500
        ]  # from call to call 500 are the other half's
        assert ROWS // 4 < len(kept) <= ROWS // 2 and len(steps) == 1 and steps[0] <= 8
    assert [t.item() for t in watch.ranges()] == [0, 2999] and watch.two_halves
    assert [t.item() for t in watch.ranges(0)] == [0, 2499] and [t.item() for t in watch.ranges(1)] == [500, 2999]


def test_samples_are_limited() -> None:
    watch = ChannelObserver(-1, samples=2)
    for i in range(5):
        watch(torch.full((1, 3, 4), float(i)))
    assert watch.kept()[0].unique().tolist() == [0, 1]
    maps = ChannelObserver(1, samples=3)
    maps(torch.randn(4, 2, 5, 5))
    maps(torch.randn(4, 2, 6, 6))
    assert [x.shape for x in maps.kept()] == [(3, 2, 5, 5)]
    maps = ChannelObserver(1, samples=6)
    maps(torch.randn(4, 2, 5, 5))
    maps(torch.randn(2, 2, 6, 6))
    assert [x.shape for x in maps.kept()] == [(4, 2, 5, 5), (2, 2, 6, 6)]


def test_bad_data_is_refused() -> None:
    watch = ChannelObserver(-1, 0, "linear", "fc")
    with pytest.raises(CalibrationError, match=r"NaN or infinite.*module 'fc'"):
        watch(torch.tensor([[1.0, float("nan")]]))
    watch(torch.ones(1, 2))
    with pytest.raises(CalibrationError, match="had 2 channels before and has 3"):
        watch(torch.ones(1, 3))
    assert watch.elements == 2


# ------------------------------------------------------------------------------------------------------- the maths
def test_scales() -> None:
    x, w = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])
    assert smooth_scale(x, w, 0.5).tolist() == [2, 1, 1]
    assert smooth_scale(x, w, 1.0).tolist() == [4, 1, 1] and smooth_scale(x, w, 0.0).tolist() == [1, 1, 1]


def test_the_search_refines_between_the_points_of_its_grid() -> None:
    found = search(lambda a: 1.0 if a is None else (a - 0.77) ** 2, *AUTO.grid)
    assert found.alpha == pytest.approx(0.775) and None in found.tried
    assert search(lambda a: 0.0 if a is None else 1.0, *AUTO.grid).alpha is None
    assert search(lambda a: 1.0, *AUTO.grid).alpha == AUTO.init_alpha  # of equal ones the first


def test_the_grid() -> None:
    assert candidates(0.9, 0.2, 0.45, 0.1) == [0.45, 0.2, 0.3, 0.4]
    assert candidates(0.5, 0.0, 1.0, 0.1) == [0.5, *(i / 10 for i in range(11) if i != 5)]


@pytest.mark.parametrize(
    "values", [{"alpha": 1.5}, {"alpha": -0.1}, {"alpha": True}, {"alpha_min": 0.8, "alpha_max": 0.2},
               {"alpha_step": 0}, {"shared_criterion": "median"}, {"n_samples": 0}, {"init_alpha": 2}],
)  # fmt: skip
def test_options_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="smooth: .*(" + "|".join(values) + ")|no alpha"):
        Smoothing(**values)


def test_options_are_text() -> None:
    how = Smoothing("auto", True, alpha_step=0.05, shared_criterion="mean", n_samples=8)
    assert Smoothing.parse(str(how)) == how and str(Smoothing()) == "smooth"
    with pytest.raises(ConfigError, match="not a smoothing"):
        Smoothing.parse("smooth{beta=1}")
    assert str(Pipeline.parse(PREPARE + ",smooth-quant")).endswith("watch-channels,smooth-quant")
    line = SmoothLine(("a", "b"), 0.5, "absorbed", ("c",), "", 2.0)
    assert SmoothLine.from_json(line.to_json()) == line


def test_calls_are_taken_out() -> None:
    gm = clone(watched(Pair(), X))
    gm.meta[CALLS] = Recalls([[X]])
    assert CALLS not in run(gm, "smooth-quant").graph.meta
    assert all("smooth" not in peek_meta(n) for n in gm.graph.nodes)
