"""The strategy "sensitivity": damages, names, the search with few evaluations, and what autotune makes of it."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
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
from inc_graph.quantization import RTNConfig, StaticQuantConfig, autotune, quantize
from inc_graph.quantization.sensitivity import _Noise, measure
from inc_graph.quantization.sensitivity_search import LayerDamage, Outcome, Plan, Sensitivity, float_config, search
from tests.sensitivity_models import FLOAT, PLAIN, TENSOR, crush_weights, damages, data, feed, mlp

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", IncWarning)
        yield


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
