"""What is not about quantization itself: options of a process and logging."""

from inc_graph.common.logger import Logger, TuningLogger, dump_elapsed_time, level, level_name, log_process, logger
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
