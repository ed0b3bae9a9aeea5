"""Options of a process, the logger, and that importing them does nothing."""

from __future__ import annotations

import datetime
import logging
import random
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inc_graph import common
from inc_graph.common.options import reseed
from inc_graph.errors import ConfigError, IncWarning


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = dict(vars(common.options))
    yield
    vars(common.options).update(before)


def test_one_seed_for_all_generators() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    common.set_random_seed(7)
    first = draw()
    assert common.options.random_seed == 7 and draw() != first
    common.set_random_seed(7)
    assert draw() == first
    for bad in (-1, 1.5, "7", True):
        with pytest.raises(ConfigError, match="whole number"):
            common.set_random_seed(bad)  # type: ignore[arg-type]


def test_paths_and_flags(tmp_path: Path) -> None:
    common.set_workspace(tmp_path / "new")
    common.set_resume_from(str(tmp_path))
    common.set_tensorboard(True)
    o = common.options
    assert (o.workspace, o.resume_from, o.tensorboard) == (str(tmp_path / "new"), str(tmp_path), True)
    assert not (tmp_path / "new").exists()
    for call, bad in ((common.set_workspace, 3), (common.set_workspace, ""), (common.set_resume_from, None)):
        with pytest.raises(ConfigError, match="must be a path"):
            call(bad)
    with pytest.raises(ConfigError, match="True or False"):
        common.set_tensorboard("yes")  # type: ignore[arg-type]
    file = tmp_path / "file"
    file.write_text("mine")
    for call in (common.set_workspace, common.set_resume_from):
        with pytest.raises(ConfigError, match=r"must be a folder, and .*file' is a file"):
            call(file)
    assert (o.workspace, o.resume_from) == (str(tmp_path / "new"), str(tmp_path))


def test_a_folder_that_is_not_there_has_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.warns(IncWarning, match=r"there is no folder '.*tpyo', so there is nothing to go on with"):
        common.set_resume_from(tmp_path / "tpyo")
    assert common.options.folder == str(tmp_path / "tpyo") and not (tmp_path / "tpyo").exists()


def test_reseeding_is_only_for_those_who_seed() -> None:
    common.options._seeded = False
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    reseed()
    assert torch.equal(torch.rand(1), first)
    common.set_random_seed(2**70)  # as large as Python takes it
    state = random.random(), np.random.rand(), torch.rand(1).item()
    reseed()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == state


def test_logging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="inc_graph")
    common.Logger.info({"a": 1, "b": 2})
    common.Logger.warning(["x", "y"])
    common.Logger.error("plain")

    @common.dump_elapsed_time("work")
    def work(x: int) -> int:
        return x + 1

    @common.log_process("phase")
    def phase() -> str:
        return "done"

    assert work(1) == 2 and work.__name__ == "work" and phase() == "done"
    common.TuningLogger.trial_start(3)
    messages = [r.getMessage() for r in caplog.records]
    assert messages[:5] == ["a: 1", "b: 2", "x", "y", "plain"] and caplog.records[2].levelname == "WARNING"
    assert messages[5].startswith("work elapsed time: ") and messages[6:] == [
        "phase starts",
        "phase ends",
        "trial 3 starts",
    ]


def test_the_level_is_that_of_the_environment_until_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import logging, os
logging.basicConfig(level=logging.WARNING, format="%(message)s")
os.environ.pop("LOGLEVEL", None)
from inc_graph import common
common.logger.info("by default the root's level counts")
os.environ["LOGLEVEL"] = "debug"
print(common.level, common.level_name)
logging.getLogger().setLevel(logging.WARNING)  # what was decided is forgotten
common.logger.debug("shown")
common.logger.setLevel(logging.ERROR)
common.logger.warning("not shown")
os.environ["LOGLEVEL"] = "nonsense"
print(common.level == logging.INFO == 20, common.level_name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("10 DEBUG\nTrue INFO\n", "shown\n")
    assert common.Logger().get_logger() is common.logger is logging.getLogger("inc_graph")
    with pytest.raises(AttributeError, match="no attribute 'levels'"):
        _ = common.levels
    monkeypatch.setenv("LOGLEVEL", "ERROR")
    assert (common.level, common.level_name) == (logging.ERROR, "ERROR")


def test_the_workspace_is_named_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In neural_compressor it is fixed when the package is imported."""

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2031, 2, 3, 4, 5, 6)

    options = common.Options()
    assert options.folder is None
    monkeypatch.setattr(sys.modules["inc_graph.common.options"], "datetime", types.SimpleNamespace(datetime=Later))
    assert options.workspace == options.workspace == str(Path("inc_workspace") / "2031-02-03_04-05-06")


def test_names_for_own_methods() -> None:
    from inc_graph.common import utils
    from inc_graph.utils import ProcessorType, cpu_info

    assert utils.Mode is common.Mode and utils.ProcessorType is ProcessorType and utils.cpu_info is cpu_info
    assert utils.logger is common.logger and utils.detect_processor_type_based_on_hw() in ProcessorType


def test_importing_logs_nothing_and_makes_no_folder(tmp_path: Path) -> None:
    program = (
        "import logging; logging.basicConfig(level=0); import inc_graph.common as c; print(c.level_name, c.options)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    assert done.stdout.startswith("INFO Options(random_seed=1978, workspace=None")
