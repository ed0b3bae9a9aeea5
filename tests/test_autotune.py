"""autotune: order, tolerance, metrics, failures, what is returned, and that nothing is changed."""

from __future__ import annotations

import copy
import io
import math
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from inc_graph.algorithms import algos_mapping
from inc_graph.common import (
    set_random_seed,
    set_tensorboard,
    set_workspace,
)
from inc_graph.common.base_config import BaseConfig
from inc_graph.common.base_tuning import ConfigSet, Evaluator, Sampler, TuningConfig
from inc_graph.errors import CaptureError, ConfigError, IncError, IncWarning
from inc_graph.export import export
from inc_graph.quantization import AWQConfig, RTNConfig, StaticQuantConfig, autotune
from inc_graph.quantization.tuning_table import Trial, TuningResult, watch
from tests import autotune_models
from tests.autotune_models import ACT, Tuned, X, run, tune

model, strict = autotune_models.model, autotune_models.strict  # fixtures


def algos(result: Any) -> list[str]:
    return [t.config.act_algo for t in result.trials]


def test_the_first_that_is_good_enough(model: nn.Module) -> None:
    q = tune(model, [1.0, 0.9, 0.995, 2.0])
    assert algos(q.tuning) == ACT[:2] and q.tuning.best is q.tuning.trials[1]
    assert q.tuning.reason == "a config meets the tolerance"
    assert q.report.kernels or q.report.reference


def test_the_best_where_none_is(model: nn.Module) -> None:
    with pytest.warns(IncWarning, match=r"no config met the tolerance: the best score is 0.9, wanted >= 0.99"):
        q = tune(model, [1.0, 0.5, 0.9, 0.7])
    assert q.tuning.best.config.act_algo == "percentile" and q.tuning.reason == "all configs are tried"


@pytest.mark.parametrize(
    ("fields", "scores", "tried"),
    [
        ({}, [0.0, -0.1, 0.0], 2),  # a share of nothing: no loss at all
        ({}, [-10.0, -10.2, -10.05], 2),
        ({"higher_is_better": False}, [20.0, 21.0, 20.1], 2),
        ({"higher_is_better": False}, [-5.0, -4.9, -4.96], 2),
        ({"relative": False, "tolerable_loss": 0.5}, [0.0, -0.6, -0.5], 2),
        ({"tolerable_loss": -0.1}, [1.0, 1.05, 1.1], 2),
        ({}, [1.0, math.nan, 1.0], 2),
        ({}, [math.inf, 1e300, math.inf], 2),  # of infinity, nothing is lost
        ({"tolerable_loss": 0.0}, [math.inf, math.inf], 1),
        ({"higher_is_better": False}, [-math.inf, -1e300, -math.inf], 2),
        ({"higher_is_better": False}, [math.inf, 7.0], 1),
        ({"higher_is_better": False, "relative": False}, [-math.inf, -1e300, -math.inf], 2),
    ],
)
def test_tolerance(model: nn.Module, fields: Any, scores: list[float], tried: int) -> None:
    q = tune(model, scores, **fields)
    assert len(q.tuning.trials) == tried and q.tuning.best is q.tuning.trials[-1] and q.tuning.best.accepted


def test_nan_is_worst(model: nn.Module) -> None:
    with pytest.warns(IncWarning, match="no config met"):
        q = tune(model, [1.0, math.nan, 0.1, math.nan])
    assert q.tuning.best is q.tuning.trials[1]
    with pytest.raises(ConfigError, match="float model is NaN"):
        tune(model, [math.nan])


def test_limits(model: nn.Module) -> None:
    with pytest.warns(IncWarning, match="no config met"):
        q = tune(model, [1.0, 0.1, 0.2, 0.3], max_trials=2)
    assert len(q.tuning.trials) == 2 and q.tuning.reason == "max_trials=2 is reached"
    with pytest.warns(IncWarning, match="no config met"):
        q = tune(model, [1.0, 0.1, 0.2], timeout=1e-9)
    assert len(q.tuning.trials) == 1 and q.tuning.reason == "timeout=1e-09 s is over"


class Backwards(Sampler):
    def __iter__(self) -> Iterator[int]:
        yield from reversed(range(len(self.config_source)))
        yield 0


def test_own_sampler(model: nn.Module) -> None:
    with pytest.warns(IncWarning, match="no config met"):
        q = tune(model, [1.0, 0.1, 0.2, 0.3], sampler=Backwards)
    assert algos(q.tuning) == ACT[::-1]
    with pytest.raises(ConfigError, match="the sampler gave 7; there are 3 configs"):
        tune(model, [1.0], sampler=lambda configs: [7])


@pytest.mark.parametrize("indices", [np.array([2, 0]), [np.int64(2), np.uint8(0)], torch.tensor([2, 0])])
def test_indices_of_numpy_and_torch(model: nn.Module, indices: Any) -> None:
    with pytest.warns(IncWarning, match="no config met"):
        q = tune(model, [1.0, 0.1, 0.2], sampler=lambda configs: indices)
    assert algos(q.tuning) == [ACT[2], ACT[0]]


class Forgetful(Sampler):
    def __iter__(self) -> Iterator[int]:
        [*range(3)]  # and no `return`
        return None  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (lambda configs: [], "the sampler gave no index, so none of 3 configs is tried"),
        (lambda configs: None, "the sampler must give indices of configs, not None"),
        (Forgetful, "the sampler must give indices of configs, not .*NoneType"),
        (lambda configs: 1, "the sampler must give indices of configs, not 1"),
        (lambda configs: [True], "the sampler gave True"),
        (lambda configs: [np.bool_(True)], "the sampler gave .*True"),
        (lambda configs: torch.tensor([True]), "the sampler gave .*True"),
        (lambda configs: [1.0], r"the sampler gave 1\.0"),
        (lambda configs: [np.int64(3)], "the sampler gave .*3"),
        (lambda configs: [-1], "the sampler gave -1"),
        (lambda configs: [StaticQuantConfig()], "the sampler gave INT8StaticQuantConfig"),
    ],
)
def test_what_samplers_may_not_give(model: nn.Module, sampler: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tune(model, [1.0], sampler=sampler)


def test_configs_are_expanded_and_tried_once(model: nn.Module) -> None:
    config = StaticQuantConfig(act_algo=["minmax", "kl"])
    given_ = [config, StaticQuantConfig(act_algo="kl"), [StaticQuantConfig()]]
    before = copy.deepcopy(given_)
    assert [c.act_algo for c in ConfigSet(given_)] == ["minmax", "kl"]
    with pytest.warns(IncWarning, match="no config met"):
        q = tune(model, [1.0, 0.1, 0.2], config_set=given_)
    assert len(q.tuning.trials) == 2 and given_ == before


@pytest.mark.parametrize("inputs", [(X,), None])
@pytest.mark.parametrize("graph", [False, True])
def test_the_model_is_not_changed_and_its_weights_not_copied(model: nn.Module, graph: bool, inputs: Any) -> None:
    source = export(model, (X,)) if graph else model
    state = {k: (v.data_ptr(), v.clone()) for k, v in source.state_dict().items()}
    want, kind = source(X), type(source)
    with pytest.warns(IncWarning, match="no config met"):
        tune(source, [1.0, 0.1, 0.2, 0.3], example_inputs=inputs)
    assert type(source) is kind and torch.equal(source(X), want)
    for name, value in source.state_dict().items():
        assert value.data_ptr() == state[name][0] and torch.equal(value, state[name][1])


def test_what_cannot_be_applied_is_a_failed_trial(model: nn.Module) -> None:
    q = tune(model, [1.0, 1.0], config_set=[AWQConfig(), StaticQuantConfig()])
    failed, good = q.tuning.trials
    assert "awq" in failed.error and failed.score is None and good.accepted and q.tuning.best is good
    assert failed.error in " ".join(str(q.tuning).split()) or "awq" in str(q.tuning)
    with pytest.raises(IncError, match=r"none of 1 configs could be applied: .*awq"):
        tune(model, [1.0], config_set=AWQConfig())


def test_errors_of_the_user_come_through(model: nn.Module) -> None:
    def broken(*args: Any) -> float:
        raise KeyError("mine")

    config = TuningConfig(StaticQuantConfig())
    with pytest.raises(KeyError, match="mine"):
        autotune(model, config, broken, run_fn=run)
    with pytest.raises(KeyError, match="mine"):
        autotune(model, config, lambda m: 1.0, run_fn=broken)
    with pytest.raises(IncError, match="captured for"):  # an error of ours, but raised by what the user runs
        autotune(model, config, lambda m: 1.0, run_fn=run, example_inputs=(X[:3],))
    with pytest.raises(ConfigError, match="the metric 'bad' gave 'high', not a number"):
        autotune(model, config, {"eval_fn": lambda m: "high", "name": "bad"}, run_fn=run)


def test_arguments(model: nn.Module) -> None:
    seen = []

    def evaluate(m: nn.Module, x: Tensor, factor: float) -> float:
        seen.append(factor)
        return float(m(x).abs().mean()) * factor

    def calibrate(prepared: nn.Module, x: Tensor) -> None:
        prepared(x)

    config = TuningConfig(StaticQuantConfig(), tolerable_loss=0.1)
    q = autotune(model, config, evaluate, (X, 2.0), calibrate, (X,), (X,))
    assert seen == [2.0, 2.0] and q.tuning.best.milliseconds > 0


def test_dynamic_shapes(model: nn.Module) -> None:
    batch = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=2)},)}
    q = tune(model, [1.0, 1.0], example_inputs=(X[:3],), **batch)
    assert q(X[:5]).shape == (5, 4)
    for source, inputs in ((export(model, (X,)), (X,)), (model, None)):
        with pytest.raises(ConfigError, match="dynamic_shapes cannot be used here"):
            tune(source, [1.0], example_inputs=inputs, **batch)


def test_several_metrics(model: nn.Module) -> None:
    accuracy = {"eval_fn": lambda m: 0.8, "weight": 0.5, "name": "accuracy"}
    cost = {"eval_fn": lambda m: torch.tensor(3.0), "weight": -0.1}
    assert Evaluator([accuracy, cost]).evaluate(model) == pytest.approx(0.1)
    assert Evaluator(accuracy).evaluate(model) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("eval_fn", "message"),
    [
        (None, "needs an eval_fn"),
        (3, r"eval_fn\[0\] must be a function"),
        ([{"eval_fn": abs}, {"fn": abs}], r"eval_fn\[1\] has unknown entries \['fn'\]"),
        ({"eval_fn": abs, "weight": "a"}, r"weight of eval_fn\[0\]"),
        ({"weight": 1.0}, r"eval_fn\[0\] must be a function"),
    ],
)
def test_bad_metrics(model: nn.Module, eval_fn: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        autotune(model, TuningConfig(StaticQuantConfig()), eval_fn, run_fn=run)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config_set": 3}, "config_set takes configs, not 3"),
        ({"config_set": []}, "no config to try"),
        ({"tolerable_loss": math.nan}, "tolerable_loss must be a finite number"),
        ({"tolerable_loss": "1%"}, "tolerable_loss must be"),
        ({"max_trials": 0}, "max_trials must be"),
        ({"timeout": -1}, "timeout must be"),
        ({"relative": 1}, "relative must be"),
        ({"sampler": 3}, "sampler must be"),
    ],
)
def test_bad_fields(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuningConfig(**fields)


class Fixed(nn.Sequential):
    @property
    def tuning(self) -> str:
        return "mine"


@pytest.mark.parametrize("make", [Tuned, lambda: Fixed(nn.Linear(8, 4))])
def test_a_model_with_a_tuning_of_its_own(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with pytest.warns(IncWarning, match="the model has a `tuning` of its own, .* in its attribute `tuning_result`"):
        q = tune(model, [1.0, 1.0], example_inputs=None)
    assert isinstance(q.tuning_result, TuningResult) and not isinstance(q.tuning, TuningResult)
    assert torch.allclose(q(X), model(X), atol=0.1)
    assert isinstance(tune(model, [1.0, 1.0]).tuning, TuningResult)  # a graph has the name free


def test_what_can_be_tuned(model: nn.Module) -> None:
    for other in ("facebook/opt-125m", model.forward, None, {"model": model}):
        with pytest.raises(CaptureError, match=r"autotune works on a torch\.nn\.Module, not on"):
            tune(other, [1.0])  # type: ignore[arg-type]
    want = tune(model, [1.0, 1.0])(X)
    program = torch.export.export(model, (X,))
    for inputs in ((X,), None):
        close = TuningConfig(StaticQuantConfig(), relative=False, tolerable_loss=0.1, higher_is_better=False)
        q = autotune(program, close, lambda m: (m(X) - model(X)).abs().max(), run_fn=run, example_inputs=inputs)
        assert torch.equal(q(X), want) and q.tuning.baseline < 1e-5


@pytest.mark.parametrize("inputs", [(X,), None])
def test_methods_of_ones_own_have_no_damage_by_layer(model: nn.Module, inputs: Any) -> None:
    class OwnConfig(BaseConfig):
        name = "own_of_this_test"
        operators = (nn.Linear,)

    algos_mapping["own_of_this_test"] = lambda model, mapping, *args, **kwargs: model
    try:
        with pytest.raises(ConfigError, match=r"cannot measure the layers of OwnConfig.*a method of one's own"):
            tune(model, [1.0], config_set=OwnConfig(), strategy="sensitivity", example_inputs=inputs)
    finally:
        del algos_mapping["own_of_this_test"]


def test_no_config(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="tune_config must be a TuningConfig"):
        autotune(model, StaticQuantConfig(), lambda m: 1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config_set"):
        autotune(model, TuningConfig(), lambda m: 1.0)


numbers = st.floats(-1e6, 1e6)


@given(baseline=numbers, score=numbers, loss=st.floats(0, 2), relative=st.booleans(), up=st.booleans())
def test_tolerance_is_a_threshold(baseline: float, score: float, loss: float, relative: bool, up: bool) -> None:
    """What is at least as good as the float model is accepted, and what is better than an accepted score."""
    config = TuningConfig(RTNConfig(), tolerable_loss=loss, relative=relative, higher_is_better=up)
    assert config.accepts(baseline, baseline)
    better = max(baseline, score) if up else min(baseline, score)
    assert config.accepts(better, baseline)
    mirrored = TuningConfig(RTNConfig(), tolerable_loss=loss, relative=relative, higher_is_better=not up)
    assert config.accepts(score, baseline) == mirrored.accepts(-score, -baseline)


def test_table(model: nn.Module) -> None:
    q = tune(model, [1.0, 0.5, 1.0])
    text = str(q.tuning)
    assert "tuning: a config meets the tolerance" in text and "best, accepted" in text and ">= 0.99" in text
    front = q.tuning.pareto()
    assert q.tuning.best in front and all(t.score is not None for t in front)


# ------------------------------------------------------------------------------------------------ seeds and tensorboard
def test_trials_are_repeatable_with_a_seed(model: nn.Module) -> None:
    def draws() -> list[Any]:
        found: list[Any] = []

        def calibrate(prepared: nn.Module) -> None:
            found.append((random.random(), np.random.rand(), torch.rand(1).item()))
            prepared(X)

        config = TuningConfig([StaticQuantConfig(act_algo=a) for a in ACT], tolerable_loss=-1.0)
        with pytest.warns(IncWarning, match="no config met"):
            autotune(model, config, lambda m: found.append(torch.rand(1).item()) or 1.0, run_fn=calibrate)
        return found

    assert len(set(draws())) == 7  # the float model, and twice each of three trials
    set_random_seed(5)
    again = draws()
    assert len(again) == 7 and len(set(again[0::2])) == 1 and len(set(again[1::2])) == 1
    assert draws() == again


class Writer:
    """In the place of tensorboard's, which need not be installed."""

    def __init__(self, log_dir: str) -> None:
        self.file = Path(log_dir) / "events"
        self.file.parent.mkdir(parents=True)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.text = f"{tag} {value} {step}\n"

    def flush(self) -> None:
        with self.file.open("a") as file:
            file.write(self.text)

    def close(self) -> None:
        with self.file.open("a") as file:
            file.write("closed\n")


def test_scores_for_tensorboard(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    set_workspace(tmp_path)
    tune(model, [1.0, 0.25, 1.0])
    assert not (tmp_path / "tensorboard").exists()  # nobody asked
    set_tensorboard(True)
    for _ in range(2):
        tune(model, [1.0, 0.25, 1.0], config_set=[AWQConfig(), *(StaticQuantConfig(act_algo=a) for a in ACT)])
    for run_ in ("1", "2"):
        text = (tmp_path / "tensorboard" / run_ / "events").read_text()
        assert text == "autotune/score 0.25 1\nautotune/score 1.0 2\nclosed\n"  # trial 0 has no score


def test_without_the_package_tensorboard_a_warning_says_so_once(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    set_workspace(tmp_path)
    set_tensorboard(True)
    with pytest.warns(IncWarning) as seen:
        q = tune(model, [1.0, 0.25, 1.0])
    assert len(seen) == 1 and "package 'tensorboard' cannot be imported" in str(seen[0].message)
    assert (
        seen[0].filename == tune.__code__.co_filename
        and len(q.tuning.trials) == 2
        and not (tmp_path / "tensorboard").exists()
    )


# --------------------------------------------------------------------------------------------------------- live, tables
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_live_table_on_a_terminal_only(model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The table shows each trial as it runs, what others print stays whole, and the result is left on the screen."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    shown: list[str] = []

    def evaluate(m: nn.Module) -> float:
        if hasattr(m, "report"):
            print("to stdout")
            print("to stderr", file=sys.stderr)
            assert not sys.stderr.isatty()  # so that no progress bar is drawn over the table
            shown.append(screen.getvalue())
        return 1.0 if not hasattr(m, "report") else 0.5 + 0.2 * len(shown)

    config = TuningConfig([StaticQuantConfig(act_algo=a) for a in ACT], tolerable_loss=0.15)
    autotune(model, config, evaluate, run_fn=run, example_inputs=(X,))
    assert sys.stderr is screen and len(shown) == 2
    assert "running" in shown[0] and "INT8StaticQuantConfig()" in shown[0] and "to stderr" in shown[0]
    assert "tuning: a config meets the tolerance" in screen.getvalue() and "Pareto front" in screen.getvalue()
    assert capsys.readouterr().out == "to stdout\n" * 2


def test_silent_elsewhere(model: nn.Module, capsys: Any) -> None:
    tune(model, [1.0, 1.0])
    assert capsys.readouterr() == ("", "")


def test_a_long_search_shows_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "16")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    result = TuningResult(1.0, 0.9, True)
    result.trials = [Trial(i, StaticQuantConfig(), 0.123 + i) for i in range(40)]
    with watch(result) as step:
        step("the forty-first")
        before = len(screen.getvalue())
        print("half a line", end="", file=sys.stderr)
        print(", and the rest", file=sys.stderr)
        live = screen.getvalue()[before:]
    assert "39.123" in live and "the forty-first" in live and "34 earlier trials not shown" in live
    assert "12.123" not in live and "half a line, and the rest" in live
    assert "12.123" in screen.getvalue()[before + len(live) :]  # the result has all of them


def test_a_failure_leaves_stderr_as_it_was(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with pytest.raises(StopIteration):
        tune(model, [1.0, 0.25])
    assert sys.stderr is screen and "tuning: broken off" in screen.getvalue()
    assert "0.25" in screen.getvalue().partition("tuning: broken off")[2]


def test_the_pareto_table(model: nn.Module) -> None:
    config = StaticQuantConfig()
    result = TuningResult(1.0, 0.9, True, reason="why")
    small, fast, good, bad = result.trials = [
        Trial(0, config, 0.5, bytes=10, milliseconds=9.0),
        Trial(1, config, 0.5, bytes=20, milliseconds=1.0),
        Trial(2, config, 0.9, accepted=True, bytes=30, milliseconds=9.0),
        Trial(3, config, 0.4, bytes=30, milliseconds=9.0),
    ]
    result.trials.append(Trial(4, config, error="brackets [of] text"))
    result.best = good
    assert result.pareto() == [small, fast, good] and bad not in result.pareto()
    trials, _, front = str(result).partition("Pareto front")
    assert "brackets [of]" in trials and [line.split("│")[1].strip() for line in front.splitlines()[4:7]] == list("012")
