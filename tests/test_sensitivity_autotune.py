"""The strategy by sensitivity within autotune: trials, the journal."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import real_models as rm
from inc_graph.common.base_tuning import TuningConfig
from inc_graph.errors import ConfigError, IncWarning
from inc_graph.quantization import AWQConfig, RTNConfig, StaticQuantConfig, autotune, quantize
from inc_graph.quantization import tuning_trial as trials
from tests.sensitivity_models import FLOAT, PLAIN, TENSOR, crush_weights, damages, data, feed, mlp

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", IncWarning)
        yield


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
