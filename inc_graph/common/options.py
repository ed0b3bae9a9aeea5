"""Options of a process: seed, workspace, where to resume from, tensorboard."""

from __future__ import annotations

import datetime
import os
import random
from pathlib import Path
from typing import Any

from inc_graph.errors import ConfigError

__all__ = ["Options", "options", "set_random_seed", "set_resume_from", "set_tensorboard", "set_workspace"]


class Options:
    """What calls fall back to where they are not told.

    Attributes:
        random_seed: Seed of what is drawn at random.
        workspace: Folder for logs and journals; named on first use, made by whoever writes to it.
        resume_from: Folder of an earlier run to go on with, or None.
        tensorboard: Whether tensors are written for tensorboard.
    """

    def __init__(self) -> None:
        self.random_seed = 1978
        self.resume_from: str | None = None
        self.tensorboard = False
        self._workspace: str | None = None

    @property
    def workspace(self) -> str:
        if self._workspace is None:  # named when it is asked for, not when the package is imported
            stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
            self._workspace = os.fspath(Path("inc_workspace") / stamp)
        return self._workspace

    @workspace.setter
    def workspace(self, value: str) -> None:
        self._workspace = value

    @property
    def folder(self) -> str | None:
        """Where an earlier run is gone on with, or where the user wants files; None if neither was said."""
        return self.resume_from or self._workspace

    def __repr__(self) -> str:
        return (
            f"Options(random_seed={self.random_seed}, workspace={self._workspace!r}, "
            f"resume_from={self.resume_from!r}, tensorboard={self.tensorboard})"
        )


options = Options()


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy and torch, and what inc_graph draws. ConfigError if it is not a whole number from 0 on."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"a seed is a whole number from 0 on, not {seed!r}")
    import numpy
    import torch

    options.random_seed = seed
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_workspace(workspace: Any) -> None:
    """Folder for logs and journals. ConfigError if it is not a path."""
    options.workspace = _path(workspace, "workspace")


def set_resume_from(resume_from: Any) -> None:
    """Folder of an earlier run to go on with. ConfigError if it is not a path."""
    options.resume_from = _path(resume_from, "resume_from")


def set_tensorboard(tensorboard: bool) -> None:
    """Whether tensors are written for tensorboard. ConfigError if it is not True or False."""
    if not isinstance(tensorboard, bool):
        raise ConfigError(f"tensorboard is True or False, not {tensorboard!r}")
    options.tensorboard = tensorboard


def _path(value: Any, name: str) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name} must be a path, not {value!r}")
    return str(os.fspath(value))
