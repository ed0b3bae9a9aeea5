"""What is not about quantization itself: options of a process and logging.

`level` and `level_name` are the level that `LOGLEVEL` asks for, as a number and as a name, at the moment.
"""

from typing import Any

from inc_graph.common import logger as _logging
from inc_graph.common.logger import Logger, TuningLogger, dump_elapsed_time, log_process, logger
from inc_graph.common.mode import Mode
from inc_graph.common.options import (
    Options,
    options,
    set_random_seed,
    set_resume_from,
    set_tensorboard,
    set_workspace,
)

__all__ = [
    "Logger",
    "Mode",
    "Options",
    "TuningLogger",
    "dump_elapsed_time",
    "level",
    "level_name",
    "log_process",
    "logger",
    "options",
    "set_random_seed",
    "set_resume_from",
    "set_tensorboard",
    "set_workspace",
]


def __getattr__(name: str) -> Any:
    if name in ("level", "level_name"):
        return getattr(_logging, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
