"""Options of a process, the logger, and that importing them does nothing."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inc_graph import common
from inc_graph.errors import ConfigError


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
    common.set_workspace(tmp_path)
    common.set_resume_from(str(tmp_path / "old"))
    common.set_tensorboard(True)
    o = common.options
    assert (o.workspace, o.resume_from, o.tensorboard) == (str(tmp_path), str(tmp_path / "old"), True)
    assert not (tmp_path / "old").exists()
    for call, bad in ((common.set_workspace, 3), (common.set_workspace, ""), (common.set_resume_from, None)):
        with pytest.raises(ConfigError, match="must be a path"):
            call(bad)
    with pytest.raises(ConfigError, match="True or False"):
        common.set_tensorboard("yes")  # type: ignore[arg-type]


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


def test_importing_logs_nothing_and_makes_no_folder(tmp_path: Path) -> None:
    program = (
        "import logging; logging.basicConfig(level=0); import inc_graph.common as c; print(c.level_name, c.options)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    assert done.stdout.startswith("INFO Options(random_seed=1978, workspace=None")
