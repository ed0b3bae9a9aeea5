"""The strategy "sensitivity": damages, names, the search with few evaluations, and what autotune makes of it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import real_models as rm
from benchmarks import sensitivity as bench
from inc_graph.common.base_tuning import TuningConfig
from inc_graph.errors import CalibrationError, ConfigError, IncWarning
from inc_graph.export import export
from inc_graph.quantization import AWQConfig, RTNConfig, StaticQuantConfig, autotune, quantize
from inc_graph.quantization import tuning_trial as trials
from inc_graph.quantization.sensitivity import Measured, _Noise, measure
from inc_graph.quantization.sensitivity_search import LayerDamage, Outcome, Plan, Sensitivity, float_config, search

pytestmark = pytest.mark.slow

FLOAT = StaticQuantConfig(w_dtype="fp32")
TENSOR = StaticQuantConfig(w_granularity="per_tensor", bias_correction=False, reduce_range=False)
PLAIN = StaticQuantConfig(bias_correction=False, reduce_range=False)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", IncWarning)
        yield


def mlp(widths: list[int], seed: int = 0) -> nn.Sequential:
    """Every layer is followed by a ReLU, and most weights are positive, so that no output dies."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layer = nn.Linear(a, b)
        layer.weight.data = torch.rand(b, a) - 0.3
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def data(width: int, rows: int = 32) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(1))


def feed(x: Tensor) -> Callable[[nn.Module], None]:
    return lambda prepared: prepared(x)


def damages(model: nn.Module, config: Any, x: Tensor, graph: bool, **kwargs: Any) -> Measured:
    return measure(export(model, (x,)) if graph else model, config, feed(x), (), **kwargs)


def crush_weights(model: nn.Sequential, at: int) -> None:
    """One row of layer `at` is enormous, and without effect: its sums are negative, and ReLU makes them 0."""
    model[2 * at].weight.data[0] = -1000.0
    model[2 * at].bias.data[0] = 0.0


def crush_inputs(model: nn.Sequential, at: int) -> None:
    """One input channel of layer `at` is enormous, and without effect: its weights are 0."""
    model[2 * at - 2].weight.data[0] = 500.0
    model[2 * at].weight.data[:, 0] = 0.0


# ------------------------------------------------------------------------------------------------------------- damages
@pytest.mark.parametrize("w_dtype", ["int8", "int4", "int2", "nf4"])  # below 8 bits weights are kept packed
@pytest.mark.parametrize("graph", [True, False])
def test_a_damage_is_that_of_the_model_with_only_this_layer_quantized(graph: bool, w_dtype: str) -> None:
    model, x = mlp([8, 16, 12, 6]), data(8)
    want = model(x)
    crush_weights(model, 1)
    config = StaticQuantConfig(w_dtype, w_granularity="per_tensor", bias_correction=False, reduce_range=False)
    measured = damages(mlp([8, 16, 12, 6]), config, x, graph)
    found = measured.layers
    assert [d.name for d in found] == ["0", "2", "4"] and {d.op for d in found} == {"linear"}
    assert not measured.unmeasured and not measured.cut
    for damage in found:
        alone = copy.copy(config)
        alone._local = {}
        alone.set_local([d.name for d in found if d is not damage], FLOAT)
        q = quantize(mlp([8, 16, 12, 6]), alone, feed(x), example_inputs=(x,), backend="eager")
        assert damage.db == pytest.approx(-rm.sqnr_db(want, q(x)), abs=0.05)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("crush", [crush_weights, crush_inputs])
@settings(max_examples=8)
@given(widths=st.lists(st.integers(4, 24), min_size=4, max_size=6), seed=st.integers(0, 1000), pick=st.integers(0, 99))
def test_a_layer_damaged_on_purpose_comes_first(
    graph: bool, crush: Any, widths: list[int], seed: int, pick: int
) -> None:
    model = mlp(widths, seed)
    at = 1 + pick % (len(widths) - 2)  # not the first: it has no layer before it that could feed it an outlier
    crush(model, at)
    with torch.no_grad():
        found = damages(model, TENSOR if crush is crush_weights else PLAIN, data(widths[0]), graph)
    order = Sensitivity.of([found])
    assert order[0].name == str(2 * at) and order[0].damage > order[1].damage + 6


class Everything(nn.Module):
    """A layer that is called twice, two of which one's name begins the other's, a sum, a product, one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc10 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twice, self.Linear = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.ReLU())
        self.add_module("a(+b", nn.Linear(4, 8))  # no regular expression

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(self.fc1(x))) + self.fc10(x)
        y = torch.matmul(y.reshape(-1, 4, 8), self.Linear(x).reshape(-1, 4, 8).transpose(1, 2))
        return self.get_submodule("a(+b")(self.inner(y))


def test_each_name_takes_its_layer_alone() -> None:
    torch.manual_seed(0)
    model, x = Everything().eval(), torch.randn(16, 8)
    graph = export(model, (x,))
    found = Sensitivity.of([measure(graph, PLAIN, feed(x), ())])
    names = {d.name for d in found}
    assert {"fc1$", "fc10", "twice", "Linear$", "inner.0", r"a\(\+b$"} <= names and not found.unmeasured
    everything = {line.name for line in quantize(graph, PLAIN, feed(x)).report.quantized}
    for name in names:
        q = quantize(graph, StaticQuantConfig().set_local(name, FLOAT), feed(x))
        gone = {x for x in q.report.floats if "set_local" in x.detail}
        assert len(gone) == (2 if name == "twice" else 1), (name, gone)
        assert {line.name for line in gone} <= everything
        assert all(re.match(name, line.module) or line.name == name for line in gone)


def test_several_outputs_count_alike() -> None:
    noise = _Noise()
    a, b = torch.ones(4), torch.full((4,), 1000.0)
    noise.add([a, b], [a * 0.9, b])
    assert noise.db() == pytest.approx(10 * math.log10(0.01 / 2))
    assert _Noise().db() is None
    zero = _Noise()
    zero.add([a], [a])
    assert zero.db() == -math.inf
    zero.add([a], [a * math.nan])
    assert zero.db() == math.inf
    masked = _Noise()
    masked.add([torch.tensor([1.0, -math.inf])], [torch.tensor([1.1, -math.inf])])
    assert masked.db() == pytest.approx(-20, abs=0.01)


class Choosy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.rare(self.a(x)) if x.sum() > 1e9 else self.a(x))


def test_what_cannot_be_measured_is_named() -> None:
    torch.manual_seed(0)
    model, x = Choosy().eval(), data(8)
    found = measure(model, PLAIN, feed(x), ())
    assert found.unmeasured == {"rare": "no calibration data reached it"}
    assert [d.name for d in found.layers] == ["a", "b"]
    config = TuningConfig(PLAIN, strategy="sensitivity")
    with pytest.warns(IncWarning) as seen:
        q = autotune(Choosy().eval(), config, lambda m: 1.0, run_fn=feed(x))
    assert any("damage of 1 layers cannot be measured" in str(w.message) and "rare" in str(w.message) for w in seen)
    assert "not measured: no calibration data reached it" in str(q.tuning.sensitivity)


def test_inputs_to_measure_on() -> None:
    model, x = mlp([8, 8, 8]), data(8)
    calls: list[int] = []

    def quietly(prepared: nn.Module) -> None:
        calls.append(1)
        prepared.forward(x)  # no hook sees it

    graph = export(model, (x,))
    with pytest.raises(ConfigError, match="no inputs to measure the damage"):
        measure(graph, PLAIN, quietly, ())
    assert len(measure(graph, PLAIN, quietly, (), (x,)).layers) == 2

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(ConfigError, match="no damage can be measured on the model's output"):
        damages(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), Counts()).eval(), PLAIN, x, True)
    with pytest.raises(CalibrationError, match=r"saw no|has seen no"):
        measure(export(model, (x,)), PLAIN, lambda prepared: None, (), (x,))


def test_only_the_first_calls_are_measured_on_and_kept_as_they_were() -> None:
    model, said = mlp([8, 8, 8]), []
    x = data(8)

    def calibrate(prepared: nn.Module) -> None:
        batch = x.clone()
        for _ in range(5):
            prepared(batch)
            batch.zero_()  # the next batch goes into the same memory

    once = measure(export(model, (x,)), PLAIN, calibrate, (), calls=1)
    many = measure(export(model, (x,)), PLAIN, calibrate, (), calls=3, step=said.append)
    assert said[-1] == "measuring layer 2 of 2, call 3 of 3"
    assert all(math.isfinite(d.db) for d in [*once.layers, *many.layers])


def test_buffers_are_not_written_to() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = mlp([8, 8, 8])
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.fc(x) + self.calls * 0

    x = data(8)
    graph = export(Counter().eval(), (x,))
    for strategy in ("configs", "sensitivity"):
        config = TuningConfig([PLAIN, TENSOR], strategy=strategy, tolerable_loss=1e9)
        autotune(graph, config, lambda m: 1.0, run_fn=feed(x))
    assert float(graph.get_buffer("calls")) == 0


# ---------------------------------------------------------------------------------------------------------- the search
def drive(sensitivity: Sensitivity, loss: Callable[[Plan], float], limit: float, configs: Any = None) -> Any:
    """(plans that were tried, the best accepted one, reason)"""
    plans = search(sensitivity, configs or [PLAIN])
    tried, best, outcome = [], None, None
    while True:
        try:
            plan = plans.send(outcome)  # type: ignore[arg-type]
        except StopIteration as end:
            return tried, best, end.value
        value = loss(plan)
        outcome = Outcome(value <= limit, value)
        tried.append(plan)
        if outcome.accepted and (
            best is None or (len(plan.floats), len(plan.finer)) < (len(best.floats), len(best.finer))
        ):
            best = plan


def bound(n: int) -> int:
    """Evaluations at the most: plain, gallop, bisection, giving back."""
    log = math.ceil(math.log2(n))
    return 1 + (log + 1) + log + log


costs_of_layers = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=80)


@given(costs=costs_of_layers, share=st.floats(0, 1.1))
def test_the_least_number_of_float_layers(costs: list[float], share: float) -> None:
    """The metric is the sum of what the layers cost, and the damages are in the order of the costs."""
    cost = {f"l{i}": c for i, c in enumerate(sorted(costs, reverse=True))}
    layers = [LayerDamage(name, "linear", 10 * math.log10(c)) for name, c in cost.items()]
    limit = share * sum(costs)
    tried, best, reason = drive(Sensitivity(layers), lambda p: _rest(cost, p), limit)
    assert len(tried) <= bound(len(costs)) and len({p.floats for p in tried}) == len(tried)
    needed = next(k for k in range(len(costs) + 1) if sum(list(cost.values())[k:]) <= limit)
    if needed == len(costs):  # something has to be quantized
        assert best is None and "the tolerance is not met" in reason
    else:
        assert len(best.floats) == needed, (best.floats, reason)
        assert f"with {needed} of" in reason or needed == 0


def _rest(cost: dict[str, float], plan: Plan) -> float:
    kept = [c for name, c in cost.items() if name not in plan.floats]
    return sum(kept)


@given(costs=costs_of_layers, share=st.floats(0, 1.1), seed=st.randoms(use_true_random=False))
def test_a_wrong_order_costs_no_more_evaluations(costs: list[float], share: float, seed: Any) -> None:
    cost = {f"l{i}": c for i, c in enumerate(costs)}
    names = list(cost)
    seed.shuffle(names)
    layers = [LayerDamage(name, "linear", -float(i)) for i, name in enumerate(names)]
    limit = share * sum(costs)
    tried, best, _ = drive(Sensitivity(layers), lambda p: _rest(cost, p), limit)
    assert len(tried) <= bound(len(costs))
    if len(costs) >= 32:
        assert len(tried) < len(costs)
    if best is not None:
        assert _rest(cost, best) <= limit


@given(n=st.integers(2, 40), enough=st.integers(0, 40))
def test_finer_configs_come_before_float_layers(n: int, enough: int) -> None:
    """Each finer layer saves one; where all of them are enough no layer is float, and no more are finer than needed."""
    layers = [LayerDamage(f"l{i}", "linear", -float(i), (None, -float(i) - 20)) for i in range(n)]
    configs = [PLAIN, TENSOR, StaticQuantConfig(act_algo="kl")]
    tried, best, _ = drive(Sensitivity(layers), lambda p: enough - len(p.finer) - 2 * len(p.floats), 0, configs)
    assert len(tried) <= bound(n) + 1
    if enough <= n:
        assert best.floats == () and len(best.finer) == enough
        assert best.finer == tuple(f"l{i}" for i in range(enough))
        assert best.config.local_config == dict.fromkeys(best.finer, configs[2])
    elif best is not None:
        assert best.floats and not set(best.floats) & set(best.finer)


def test_finer_configs_that_save_nothing_are_left_out() -> None:
    layers = [LayerDamage(f"l{i}", "linear", -float(i), (-float(i) - 20,)) for i in range(8)]
    _, best, _ = drive(Sensitivity(layers), lambda p: 3 - len(p.floats) - 0.01 * len(p.finer), 0, [PLAIN, TENSOR])
    assert best.floats == ("l0", "l1", "l2") and best.finer == ()
    slight = LayerDamage("a", "linear", -30.0, (-30.9, -30.5))
    assert slight.best is None and slight.least == -30.0
    assert LayerDamage("a", "linear", -30.0, (-31.0, -33.0, None)).best == 1


def test_what_was_not_measured_is_the_last_to_be_float() -> None:
    found = Sensitivity([LayerDamage(f"l{i}", "linear", -float(i)) for i in range(3)], {"x": "why"})
    tried, best, _ = drive(found, lambda p: float("x" not in p.floats), 0)
    assert best is None and max(len(p.floats) for p in tried) == 3


def test_the_float_config() -> None:
    assert float_config(PLAIN) == FLOAT and float_config(RTNConfig()) == RTNConfig(dtype="fp32")
    base = StaticQuantConfig().set_local("0", TENSOR)
    plan = next(search(Sensitivity([LayerDamage("0", "linear", 0.0), LayerDamage("2", "linear", -1.0)]), [base]))
    assert plan.config == base and plan.config is not base


# ------------------------------------------------------------------------------------------------------------ autotune
def tune(model: nn.Module, x: Tensor, graph: bool = True, **fields: Any) -> tuple[nn.Module, list[nn.Module]]:
    """Tuned to an SQNR; and the models that were evaluated."""
    want, seen = model(x), []

    def db(m: nn.Module) -> float:
        seen.append(m)
        return min(rm.sqnr_db(want, m(x)), 200.0)

    fields = {"config_set": TENSOR, "strategy": "sensitivity", "relative": False, "tolerable_loss": 170.0} | fields
    q = autotune(model, TuningConfig(**fields), db, run_fn=feed(x), example_inputs=(x,) if graph else None)
    return q, seen


@pytest.mark.parametrize("graph", [True, False])
def test_the_damaged_layer_is_left_float(graph: bool, tmp_path: Path) -> None:
    model, x = mlp([8, 16, 16, 16, 16, 6]), data(8)
    crush_weights(model, 2)
    plain = quantize(mlp([8, 16, 16, 16, 16, 6]), TENSOR, feed(x), example_inputs=(x,))
    assert plain is not None
    q, seen = tune(model, x, graph)
    result = q.tuning
    assert [t.accepted for t in result.trials] == [False, True] and len(seen) == 3  # the float model, and two
    assert result.best.floats == ("4",) and result.reason == "with 1 of 5 layers float the tolerance is met"
    assert result.sensitivity[0].name == "4" and [d.name for d in result.sensitivity[:1]] == ["4"]
    assert len(result.sensitivity) == 5 and result.sensitivity.seconds > 0
    file = tmp_path / "config.json"  # an ordinary config: saved, read and used again
    result.best.config.to_json_file(file)
    config = type(TENSOR).from_json_file(file)
    assert config == result.best.config and config.local_config == {"4": FLOAT}
    again = quantize(model, config, feed(x), inplace=False, example_inputs=(x,) if graph else None)
    assert torch.equal(again(x), q(x))
    text = str(result)
    assert "1 float: 4" in text and "damage by layer" in text and "Pareto front" in text


@pytest.mark.parametrize("graph", [True, False])
def test_the_float_model_is_shared_and_stays_as_it_is(graph: bool) -> None:
    model, x = mlp([8, 16, 16, 6]), data(8)
    crush_weights(model, 1)
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    mine = {p.data_ptr() for p in model.parameters()}
    copied: list[Any] = []

    def calibrate(prepared: nn.Module) -> None:
        copied.extend(n for n, p in prepared.named_parameters() if p.data_ptr() not in mine)
        prepared(x)

    config = TuningConfig(TENSOR, strategy="sensitivity", relative=False, tolerable_loss=1e9)
    autotune(model, config, lambda m: float(m(x).sum()), run_fn=calibrate, example_inputs=(x,) if graph else None)
    assert copied == [] and all(isinstance(m, nn.Linear | nn.ReLU) for m in model)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == state[name][0] and torch.equal(value, state[name][1])


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_no_more_trials_than_allowed(most: int) -> None:
    model, x = mlp([8] * 9), data(8)
    with pytest.warns(IncWarning, match="no config met the tolerance"):
        q, seen = tune(model, x, max_trials=most, tolerable_loss=0.0)
    assert len(seen) == most + 1 and len(q.tuning.trials) == most
    assert q.tuning.reason == f"max_trials={most} is reached"


def test_a_tolerance_out_of_reach() -> None:
    model, x = mlp([8] * 6), data(8)
    with pytest.warns(IncWarning, match="no config met the tolerance"):
        q, seen = tune(model, x, tolerable_loss=-1.0)
    assert q.tuning.reason == "even with 4 of 5 layers float the tolerance is not met"
    scores = [t.score for t in q.tuning.trials]
    assert q.tuning.best.score == max(scores) and len(seen) == len(scores) + 1


def test_another_config_before_float() -> None:
    """Per-channel weights cure what one row does to the others, so that no layer has to be float."""
    model, x = mlp([8, 16, 16, 16, 6]), data(8)
    crush_weights(model, 1)
    both = StaticQuantConfig(w_granularity=["per_tensor", "per_channel"], bias_correction=False, reduce_range=False)
    q, _ = tune(model, x, config_set=both)
    best = q.tuning.best
    assert best.floats == () and best.finer == ("2",) and best.accepted
    assert best.config.local_config["2"].w_granularity == "per_channel"
    first = q.tuning.sensitivity[0]
    assert first.name == "2" and first.best == 0 and first.others[0] < first.damage - 10
    assert "with config 1" in str(q.tuning.sensitivity)


def test_local_settings_stay_in_force() -> None:
    """What a local setting speaks of keeps it: another config of the set does not replace it."""
    model, x = mlp([8, 16, 16, 16, 6]), data(8)
    crush_weights(model, 1)
    both = StaticQuantConfig(w_granularity=["per_tensor", "per_channel"], bias_correction=False, reduce_range=False)
    both.set_local("2", TENSOR).set_local("0", FLOAT)
    q, _ = tune(model, x, config_set=both)
    assert q.tuning.best.floats == ("2",) and {d.name for d in q.tuning.sensitivity} == {"2", "4", "6"}
    assert q.tuning.sensitivity[0].others == (None,)
    assert q.tuning.best.config.local_config["0"] == FLOAT
    assert both.local_config == {"2": TENSOR, "0": FLOAT}


@pytest.mark.parametrize("graph", [True, False])
def test_more_bits_where_few_do_harm(graph: bool) -> None:
    model, x = mlp([8, 16, 16, 6]), data(8)
    few = StaticQuantConfig("int4", bias_correction=False, reduce_range=False)
    q, _ = tune(model, x, graph, config_set=[few, PLAIN], tolerable_loss=200 - 35.0)
    best = q.tuning.best
    assert best.accepted and best.finer and not best.floats and len(q.tuning.sensitivity) == 3
    assert all(d.others[0] < d.damage - 10 for d in q.tuning.sensitivity)


@pytest.mark.parametrize("graph", [True, False])
def test_a_composition(graph: bool) -> None:
    """Each layer is measured as its part quantizes it, and left float whichever part it is in."""
    model, x = mlp([8, 16, 16, 16, 6]), data(8)
    crush_weights(model, 1)
    both = StaticQuantConfig(w_granularity="per_tensor", white_list=["0$", "2$"], reduce_range=False)
    both += StaticQuantConfig("int4", white_list=["4$"], reduce_range=False)
    before = copy.deepcopy(both)
    q, _ = tune(model, x, graph, config_set=both, tolerable_loss=200 - 15.0)
    result = q.tuning
    assert [d.name for d in result.sensitivity] == ["2", "4", "0"] and result.best.floats == ("2",)
    assert result.best.accepted and {line.module for line in q.report.quantized} == {"0", "4"} and both == before
    with pytest.warns(IncWarning, match="no config met the tolerance"):
        q, _ = tune(model, x, graph, config_set=both, tolerable_loss=0.0)
    assert ("2", "4") in [t.floats for t in q.tuning.trials]
    with pytest.raises(ConfigError, match="takes a composition only as the one config of the set"):
        tune(model, x, graph, config_set=[both, PLAIN + PLAIN])


@pytest.mark.parametrize("graph", [True, False])
def test_the_timeout_ends_measuring(graph: bool, tmp_path: Path) -> None:
    """One trial, of the first config, is done all the same; what was measured by half is not in the journal."""
    model, x = mlp([8] * 6), data(8)
    journal = tmp_path / "j"
    calls: list[int] = []

    def calibrate(prepared: nn.Module) -> None:
        calls.append(1)
        prepared(x)
        time.sleep(0.3)

    config = TuningConfig([PLAIN, TENSOR], strategy="sensitivity", timeout=0.2, journal=journal)
    with pytest.warns(IncWarning, match=r"timeout=0.2 s was over while .* that of 0 of 5 layers is known"):
        q = autotune(model, config, lambda m: 1.0, run_fn=calibrate, example_inputs=(x,) if graph else None)
    result = q.tuning
    assert len(calls) == 2 and len(result.trials) == 1 and result.trials[0].config == PLAIN
    assert not result.sensitivity.layers and set(result.sensitivity.unmeasured.values()) == {"the time was over"}
    assert not any("measured" in json.loads(line) for line in journal.read_text().splitlines())
    left = iter([False, False, True])
    some = damages(mlp([8] * 6), PLAIN, x, graph, over=lambda: next(left))
    assert some.cut and [d.name for d in some.layers] == ["0", "2"] and len(some.unmeasured) == 3


def test_what_the_strategy_does_not_take() -> None:
    model, x = mlp([8, 8, 8]), data(8)
    with pytest.raises(ConfigError, match="did you mean 'sensitivity'"):
        TuningConfig(PLAIN, strategy="sensitivty")
    with pytest.raises(ConfigError, match="takes no sampler"):
        TuningConfig(PLAIN, strategy="sensitivity", sampler=lambda configs: [0])
    with pytest.raises(ConfigError, match="sensitivity_calls must be a whole number"):
        TuningConfig(PLAIN, sensitivity_calls=0)
    with pytest.raises(ConfigError, match="INT8StaticQuantConfig and RTNConfig do not go together"):
        tune(model, x, config_set=[PLAIN, RTNConfig()])
    with pytest.raises(NotImplementedError, match="awq"):
        tune(model, x, config_set=AWQConfig())
    with pytest.raises(ConfigError, match="needs calibration data"):
        autotune(model, TuningConfig(PLAIN, strategy="sensitivity"), lambda m: 1.0, example_inputs=(x,))


def test_errors_of_calibration_come_through() -> None:
    def broken(prepared: nn.Module) -> None:
        raise ConfigError("mine")  # an error of ours, but raised by what the user runs

    model, x = mlp([8, 8, 8]), data(8)
    config = TuningConfig([PLAIN, TENSOR], strategy="sensitivity")
    with pytest.raises(ConfigError, match="mine"):
        autotune(model, config, lambda m: 1.0, run_fn=broken, example_inputs=(x,))


def test_a_config_that_fails_is_left_out() -> None:
    bad = StaticQuantConfig(white_list=[nn.Conv2d])
    model, x = mlp([8, 8, 8]), data(8)
    with pytest.warns(IncWarning, match="is left out of the search: .*nothing in this model can be quantized"):
        q, _ = tune(model, x, config_set=[TENSOR, bad], tolerable_loss=1e9)
    assert len(q.tuning.sensitivity) == 2 and q.tuning.sensitivity[0].others == ()


# --------------------------------------------------------------------------------------------------------- the journal
def count(m: Any) -> int:
    """A metric that falls with each layer that is left float."""
    return len(m.report.quantized) if hasattr(m, "report") else 0


def test_an_interrupted_search_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp([8] * 9), data(8)
    seen: list[nn.Module] = []

    def search_with(journal: Path | None, most: int = 100) -> tuple[Any, int]:
        config = TuningConfig(PLAIN, tolerable_loss=3, max_trials=most, relative=False, higher_is_better=False,
                              journal=journal, strategy="sensitivity")  # fmt: skip
        before = len(seen)
        q = autotune(model, config, lambda m: seen.append(m) or count(m), run_fn=feed(x), example_inputs=(x,))
        return q, len(seen) - before

    journal = tmp_path / "j.jsonl"
    with pytest.warns(IncWarning, match="no config met"):
        _, evaluations = search_with(journal, 3)
    kinds = [next(iter(json.loads(line))) for line in journal.read_text().splitlines()]
    assert kinds == ["format", "measured", "config", "config", "config"] and evaluations == 4
    want, evaluations = search_with(None)
    assert len(want.tuning.best.floats) == 5 and evaluations == len(want.tuning.trials) + 1 >= 7

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(trials, "measure", never)
    q, left = search_with(journal)
    assert [t.config for t in q.tuning.trials] == [t.config for t in want.tuning.trials]
    assert left == evaluations - 4 and q.tuning.best.floats == want.tuning.best.floats
    assert list(q.tuning.sensitivity) == list(want.tuning.sensitivity)
    assert q.tuning.sensitivity.seconds == 0 and torch.equal(q(x), want(x))
    q, left = search_with(journal)
    assert left == 0 and q.tuning.best.floats == want.tuning.best.floats and torch.equal(q(x), want(x))


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"config": "x"}',
        '{"measured": "x", "layers": [[1]], "unmeasured": {}}',
        '{"measured": "x", "layers": [["a", "linear", "loud", true]], "unmeasured": {}}',
        '{"measured": "x", "layers": [], "unmeasured": []}',
        '{"other": 1}',
        "7",
        '{"config": "x", "score": "abc", "bytes": 1, "milliseconds": null, "seconds": 1.0}',
        '{"config": "x", "score": null, "bytes": 1, "milliseconds": null, "seconds": 1.0}',
        '{"config": "x", "score": 1.0, "bytes": 1, "milliseconds": "1", "seconds": 1.0}',
        '{"config": [], "score": 1.0, "bytes": 1, "milliseconds": null, "seconds": 1.0}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    model, x = mlp([8, 8, 8]), data(8)
    journal = tmp_path / "j"
    tune(model, x, journal=journal, tolerable_loss=1e9)
    text = journal.read_text() + line + "\n"
    journal.write_text(text)
    with pytest.raises(ConfigError, match=f"line {text.count(chr(10))} is damaged"):
        tune(model, x, journal=journal, tolerable_loss=1e9)
    assert journal.read_text() == text


SCRIPT = """
import os, signal, sys, warnings
import torch
from torch import nn
from inc_graph.quantization import StaticQuantConfig, TuningConfig, autotune

torch.manual_seed(0)
model = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 4)).eval()
x = torch.rand(32, 8)
calls, last = 0, int(sys.argv[2])

def count(m):
    global calls
    calls += 1
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(m.report.quantized) if hasattr(m, "report") else 0

config = TuningConfig(StaticQuantConfig(), tolerable_loss=3, relative=False, higher_is_better=False,
                      journal=sys.argv[1], strategy="sensitivity")
with torch.no_grad():
    q = autotune(model, config, count, run_fn=lambda m: m(x), example_inputs=(x,))
print(calls, len(q.tuning.trials), *q.tuning.best.floats)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def search_in_a_process(journal: str, last: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", str(script), str(tmp_path / journal), str(last)]
        return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300, check=False)

    whole = search_in_a_process("whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert search_in_a_process("killed", 4).returncode == -signal.SIGKILL
    rest = search_in_a_process("killed", -1)
    calls, tried, *floats = whole.stdout.split()
    assert int(tried) >= 4 and int(calls) == int(tried) + 1
    # three evaluations were done before the kill: of the float model, and of two trials
    assert rest.stdout.split() == [str(int(calls) - 3), tried, *floats], rest.stderr


# -------------------------------------------------------------------------------------------------------- a real model
@pytest.mark.slow
@pytest.mark.real_model
def test_efficientnet_lite0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tolerance that plain static INT8 misses is met with few float layers, in fewer evaluations than one a layer."""
    monkeypatch.setenv("INC_VERIFY", "0")  # each of many trials would verify each pass
    found = bench.efficientnet(say=lambda text: None, calibration=16)
    plain, tuned = found.rows["plain"], found.rows["sensitivity"]
    assert plain.score > bench.TOLERANCE >= tuned.score
    assert found.layers == 59 and 0 < tuned.floats <= found.layers // 4
    assert tuned.evaluations < found.layers // 2
    # the photographs took no part in the search
    assert tuned.kl < plain.kl / 2 and tuned.db > plain.db + 3 and tuned.top1 >= found.rows["float"].top1 - 1
