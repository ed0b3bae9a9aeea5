"""Options of a process: seed, workspace, where to resume from, tensorboard."""

from __future__ import annotations

import datetime
import os
import random
import warnings
from pathlib import Path
from typing import Any

from inc_graph.errors import ConfigError, IncWarning

__all__ = ["Options", "options", "reseed", "set_random_seed", "set_resume_from", "set_tensorboard", "set_workspace"]


class Options:
    """What calls fall back to where they are not told.

    Attributes:
        random_seed: What `reseed` seeds with, once `set_random_seed` was called.
        workspace: Folder for logs and journals; named on first use, made by whoever writes to it.
        resume_from: Folder of an earlier run to go on with, or None.
        tensorboard: Whether `autotune` writes its scores for tensorboard.
    """

    def __init__(self) -> None:
        self.random_seed = 1978
        self._seeded = False
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
    """Seed Python, numpy and torch, now and before each trial of `autotune`, so that trials are repeatable.

    Raises:
        ConfigError: it is not a whole number from 0 on.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"a seed is a whole number from 0 on, not {seed!r}")
    options.random_seed, options._seeded = seed, True
    reseed()


def reseed() -> None:
    """Seed Python, numpy and torch with what `set_random_seed` was given; nothing if it was not called."""
    if not options._seeded:
        return
    import numpy
    import torch

    random.seed(options.random_seed)
    numpy.random.seed(options.random_seed % 2**32)
    torch.manual_seed(options.random_seed % 2**64)


def set_workspace(workspace: Any) -> None:
    """Folder for logs and journals; it is made when the first of them is written. ConfigError if it is no folder."""
    options.workspace = _folder(workspace, "workspace")


def set_resume_from(resume_from: Any) -> None:
    """Folder that was the workspace of an earlier run, to go on with.

    Raises:
        ConfigError: it is not the path of a folder. A warning says so if it is not there.
    """
    folder = _folder(resume_from, "resume_from")
    if not Path(folder).exists():
        text = f"set_resume_from: there is no folder {folder!r}, so there is nothing to go on with"
        warnings.warn(f"{text}; a search starts from the beginning, and is written there", IncWarning, stacklevel=2)
    options.resume_from = folder


def set_tensorboard(tensorboard: bool) -> None:
    """Whether `autotune` writes the score of each trial for tensorboard: into "tensorboard" of the workspace.

    Raises:
        ConfigError: it is not True or False.
    """
    if not isinstance(tensorboard, bool):
        raise ConfigError(f"tensorboard is True or False, not {tensorboard!r}")
    options.tensorboard = tensorboard


def _folder(value: Any, name: str) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name} must be a path, not {value!r}")
    path = str(os.fspath(value))
    if Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"{name} must be a folder, and {path!r} is a file", hint="give the folder that it is in")
    return path
