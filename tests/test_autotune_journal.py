"""The journal of autotune: what was tried is not tried again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from inc_graph.common import (
    set_resume_from,
    set_workspace,
)
from inc_graph.common.base_tuning import TuningConfig
from inc_graph.errors import ConfigError, IncWarning
from inc_graph.export import export
from inc_graph.quantization import AutoRoundConfig, RTNConfig, StaticQuantConfig, autotune
from inc_graph.quantization.journal import _key, fingerprint
from tests import autotune_models
from tests.autotune_models import ACT, X, run, tune

model, strict = autotune_models.model, autotune_models.strict  # fixtures


# ---------------------------------------------------------------------------------------------------------- the journal
def test_an_interrupted_search_goes_on(model: nn.Module, tmp_path: Path) -> None:
    journal, calls = tmp_path / "new" / "autotune.jsonl", []

    def evaluate(m: nn.Module) -> float:
        calls.append(m)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {1: 1.0, 2: 0.9, 4: 0.5, 5: 0.7}[len(calls)]

    config = TuningConfig([StaticQuantConfig(act_algo=a) for a in ACT], journal=journal)
    with pytest.raises(KeyboardInterrupt):
        autotune(model, config, evaluate, run_fn=run)
    assert len(journal.read_text().splitlines()) == 2
    with journal.open("a") as file:
        file.write('{"config": "cut o')  # as if the machine had stopped
    with pytest.warns(IncWarning, match="the best score is 0.9"):
        q = autotune(model, config, evaluate, run_fn=run)
    assert len(calls) == 5 and [t.score for t in q.tuning.trials] == [0.9, 0.5, 0.7]
    assert q.tuning.best is q.tuning.trials[0] and q(X).shape == (64, 4) and q.tuning.baseline == 1.0
    config.tolerable_loss = 0.2
    q = autotune(model, config, evaluate, run_fn=run)
    assert len(calls) == 5 and q.tuning.best.accepted and len(q.tuning.trials) == 1


def test_the_folder_of_the_process(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for each search: only `set_resume_from` goes on with one, and only with one of the same search."""
    monkeypatch.chdir(tmp_path)
    tune(model, [1.0, 1.0])
    assert not list(tmp_path.iterdir())
    set_workspace("work")
    with pytest.warns(IncWarning, match="no config met"):
        tune(model, [1.0, 0.1, 0.2, 0.3], config_set=StaticQuantConfig(act_algo=ACT))
    tune(model, [1.0, 1.0], config_set=StaticQuantConfig(act_algo=ACT))  # starts anew
    other = copy.deepcopy(model)
    other[0].weight[0, 0] += 1.0
    tune(other, [5.0, 5.0])
    tune(model, [123.0, 123.0], higher_is_better=False)
    files = {p.name: p.read_text() for p in Path("work").iterdir()}
    assert len(files) == 4 and all(name.startswith("autotune-") for name in files)
    set_resume_from("work")
    assert tune(model, []).tuning.baseline == 1.0 and tune(other, []).tuning.baseline == 5.0
    assert {p.name: p.read_text() for p in Path("work").iterdir()} == files
    with pytest.warns(IncWarning, match="'work' holds no journal of this search"):
        tune(model, [1.0, 1.0], example_inputs=None)
    assert len(list(Path("work").iterdir())) == 5
    assert tune(model, [], example_inputs=None).tuning.best.accepted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"higher_is_better": False}, "another search: higher_is_better was True, and is False"),
        ({"eval_fn": {"eval_fn": lambda m: 1.0, "name": "b"}}, r"another search: metrics was \[\['a', 1.0\]\], and is"),
        ({"eval_fn": {"eval_fn": lambda m: 1.0, "name": "a", "weight": 2}}, "another search: metrics was"),
        ({"example_inputs": None}, "another search: scope was 'graph', and is 'modules'"),
    ],
)
def test_a_journal_of_another_search_is_refused(
    model: nn.Module, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    def go(**kwargs: Any) -> Any:
        config = TuningConfig(
            StaticQuantConfig(), journal=tmp_path / "j", higher_is_better=kwargs.pop("higher_is_better", True)
        )
        given = {"eval_fn": {"eval_fn": lambda m: 1.0, "name": "a"}, "example_inputs": (X,)} | kwargs
        return autotune(model, config, run_fn=run, **given)

    go()
    text = (tmp_path / "j").read_text()
    with pytest.raises(ConfigError, match=message):
        go(**changed)
    assert (tmp_path / "j").read_text() == text and go().tuning.best.accepted


def test_what_a_config_is_known_by() -> None:
    """Also what its dictionary leaves out, and the order of a composition."""
    a, b = RTNConfig(), StaticQuantConfig()
    different = [a, b, a + b, b + a, AutoRoundConfig(), AutoRoundConfig(processor="a"), AutoRoundConfig(processor="b"),
                 RTNConfig().set_local("0", AutoRoundConfig(processor="a")),
                 RTNConfig().set_local("0", AutoRoundConfig(processor="b"))]  # fmt: skip
    keys = [_key(c) for c in different]
    assert None not in keys and len(set(keys)) == len(keys) and keys == [_key(copy.deepcopy(c)) for c in different]
    assert _key(AutoRoundConfig(processor=object())) is None  # what cannot be written down is tried again


def test_places_where_no_journal_can_be(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"the journal .* is a folder") as e:
        tune(model, [1.0], journal=tmp_path)
    assert "autotune.jsonl" in str(e.value) and file.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"the journal .* cannot be written"):
        tune(model, [1.0, 1.0], journal=file / "j")
    deep = tmp_path / "deep"
    deep.write_text("[" * 100_000 + "\n")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        tune(model, [1.0], journal=deep)


def test_a_lambda_is_tried_again(model: nn.Module, tmp_path: Path) -> None:
    config = StaticQuantConfig().set_local(lambda o: o.name == "0", StaticQuantConfig(w_dtype="fp32"))
    for scores in ([1.0, 1.0], [1.0]):
        q = tune(model, scores, config_set=config, journal=tmp_path / "j")
        assert q.tuning.best.accepted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "not a journal"),
        ("hello\n", "line 1 is not JSON"),
        ("[1]\n", "not a journal of autotune in format 2"),
        ('{"format": 2, "model": "x", "baseline": 1}\n', "journal of another model"),
    ],
)
def test_other_files_are_refused_and_kept(model: nn.Module, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "j"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        tune(model, [1.0], journal=file)
    assert file.read_text() == text


def test_fingerprints(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    assert fingerprint(other) == fingerprint(model)
    graph = export(model, (X,))
    assert fingerprint(graph) == fingerprint(export(other, (X,))) != fingerprint(model)
    other[1] = nn.GELU().eval()
    assert fingerprint(other) != fingerprint(model) and fingerprint(export(other, (X,))) != fingerprint(graph)
    other[1] = nn.ReLU().eval()
    other[0].weight[0, 0] += 1e-3
    assert fingerprint(other) != fingerprint(model) != fingerprint(nn.ReLU())
