"""autotune over alphas of SmoothQuant, alone and in front of other methods: order, journal, resume, sensitivity."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import IncWarning
from inc_graph.quantization import RTNConfig, SmoothQuantConfig, StaticQuantConfig, TuningConfig, autotune
from tests.smooth_models import gated_with_outliers

SIGNED: dict[str, Any] = {"act_dtype": "int8", "act_sym": True}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", IncWarning)
        yield


@pytest.fixture
def model() -> nn.Module:
    return gated_with_outliers()


DATA = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(s)) for s in range(4)]


def run(prepared: nn.Module) -> None:
    for x in DATA:
        prepared(x)


class Error:
    """Relative error of a model's results; counts how often it was asked."""

    def __init__(self, model: nn.Module) -> None:
        self.want = [model(x) for x in DATA]
        self.asked = 0

    def __call__(self, model: nn.Module) -> Tensor:
        self.asked += 1
        got = [model(x) for x in DATA]
        return torch.stack([(a - b).norm() / a.norm() for a, b in zip(self.want, got, strict=True)]).mean()


def tune(model: nn.Module, config_set: Any, error: Error, inputs: Any = (DATA[0],), **fields: Any) -> Any:
    fields = {"tolerable_loss": 0.0, "relative": False, "higher_is_better": False, **fields}
    config = TuningConfig(config_set, **fields)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no config met the tolerance", IncWarning)
        return autotune(model, config, error, run_fn=run, example_inputs=inputs)


def alphas(result: Any) -> list[Any]:
    """Of each trial, as its config says it."""
    found = []
    for trial in result.trials:
        parts = getattr(trial.config, "config_list", [trial.config])
        found.append(next((c.alpha for c in parts if isinstance(c, SmoothQuantConfig)), None))
    return found


@pytest.mark.parametrize("inputs", [(DATA[0],), None], ids=["graph", "layers"])
def test_one_method_after_the_other(model: nn.Module, inputs: Any) -> None:
    configs = [
        StaticQuantConfig(**SIGNED),
        SmoothQuantConfig(alpha=0.5) + StaticQuantConfig(**SIGNED),
        SmoothQuantConfig(alpha="auto"),
    ]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    q = tune(model, configs, Error(model), inputs)
    scores = [t.score for t in q.tuning.trials]
    assert alphas(q.tuning) == [None, 0.5, "auto"] and len(set(scores)) == 3
    assert q.tuning.best.index > 0 and min(scores) == q.tuning.best.score < 0.75 * scores[0]
    assert float(Error(model)(q)) == pytest.approx(q.tuning.best.score)  # the model that is given back is the best one
    # layer by layer the model's own forward might show the norm's result elsewhere: each layer multiplies its input
    want = (2, "absorbed") if inputs else (3, "multiplied")
    assert (len(q.report.smoothing), q.report.smoothing[0].by) == want
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        SmoothQuantConfig(alpha=[0.3, 0.6, "auto"], **SIGNED),
        SmoothQuantConfig(alpha=[0.3, 0.6, "auto"]) + StaticQuantConfig(**SIGNED),
        StaticQuantConfig(**SIGNED) + SmoothQuantConfig(alpha=[0.3, 0.6, "auto"]),
        SmoothQuantConfig(alpha=[0.3, 0.6, "auto"]) + RTNConfig(bits=4, group_size=-1),
    ],
    ids=["alone", "before", "behind", "weights"],
)
def test_a_list_of_alphas(model: nn.Module, config: Any) -> None:
    q = tune(model, config, Error(model))
    assert alphas(q.tuning) == [0.3, 0.6, "auto"]
    assert all(t.error == "" for t in q.tuning.trials)
    assert q.tuning.trials[0].score != q.tuning.trials[1].score  # "auto" may find the same as one of them
    found = {line.alpha for line in q.report.smoothing}
    best = alphas(q.tuning)[q.tuning.best.index]
    assert found == {best} if best != "auto" else len(q.report.smoothing) == 2


@pytest.mark.slow
def test_the_candidates_of_the_config_itself(model: nn.Module) -> None:
    q = tune(model, SmoothQuantConfig.get_config_set_for_tuning(), Error(model), max_trials=5)
    facts = [(c.alpha, c.folding, c.scale_sharing) for c in (t.config for t in q.tuning.trials)]
    assert len(set(facts)) == 5 and q.tuning.reason == "max_trials=5 is reached"
    assert len(TuningConfig(SmoothQuantConfig.get_config_set_for_tuning()).config_set) == 36


def test_it_stops_at_the_first_that_is_good_enough(model: nn.Module) -> None:
    error = Error(model)
    config = SmoothQuantConfig(alpha=[0.0, 0.5, 0.7]) + StaticQuantConfig(**SIGNED)
    scores = [t.score for t in tune(model, config, error).tuning.trials]
    q = tune(model, config, error, tolerable_loss=scores[1])
    assert alphas(q.tuning) == ([0.0] if scores[0] <= scores[1] else [0.0, 0.5])
    assert q.tuning.reason == "a config meets the tolerance" and q.tuning.best.accepted


def test_an_interrupted_search_goes_on(model: nn.Module, tmp_path: Path) -> None:
    error, path = Error(model), tmp_path / "journal.jsonl"
    config = SmoothQuantConfig(alpha=[0.2, 0.5, "auto"], auto_alpha_args={"n_samples": 4}) + StaticQuantConfig(**SIGNED)
    first = tune(model, config, error, journal=path, max_trials=2)
    assert error.asked == 3 and len(path.read_text().splitlines()) == 3
    second = tune(model, config, error, journal=path)
    assert error.asked == 4 and alphas(second.tuning) == [0.2, 0.5, "auto"]  # one that is new; and no float model
    assert [t.score for t in second.tuning.trials[:2]] == [t.score for t in first.tuning.trials]
    third = tune(model, config, error, journal=path)
    assert error.asked == 4 and torch.equal(third(DATA[0]), second(DATA[0]))  # quantized once more from what is known
    other = SmoothQuantConfig(alpha=0.2, auto_alpha_args={"n_samples": 8}) + StaticQuantConfig(**SIGNED)
    tune(model, other, error, journal=path)
    assert error.asked == 5  # another search for alpha is another config
    keys = [json.loads(line)["config"] for line in path.read_text().splitlines()[1:]]
    assert len(set(keys)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [(DATA[0],), None], ids=["graph", "layers"])
@pytest.mark.parametrize("composed", [False, True])
def test_which_layers_have_to_stay_float(model: nn.Module, composed: bool, inputs: Any) -> None:
    config: Any = SmoothQuantConfig(alpha=0.5, **SIGNED)
    config = SmoothQuantConfig(alpha=0.5) + StaticQuantConfig(**SIGNED) if composed else config
    q = tune(model, config, Error(model), inputs, strategy="sensitivity", tolerable_loss=0.005)
    assert {d.name for d in q.tuning.sensitivity} == {"gate", "up", "down"}
    smoothed = {name for line in q.report.smoothing for name in line.layers}
    assert smoothed == {"gate", "up", "down"} - set(q.tuning.best.floats)
