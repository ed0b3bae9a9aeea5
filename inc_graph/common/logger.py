"""The logger `inc_graph`, and functions around it. Silent until somebody configures logging, or `LOGLEVEL` is set."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Logger", "TuningLogger", "dump_elapsed_time", "log_process", "logger"]

F = TypeVar("F", bound=Callable[..., Any])


def _level() -> int:
    wanted = os.environ.get("LOGLEVEL", "").strip().upper()
    found = getattr(logging, wanted, None)
    return found if isinstance(found, int) else logging.INFO


class _FromEnvironment(logging.Logger):
    """A logger whose level, until somebody sets it, is that of `LOGLEVEL`, read when it first logs."""

    def getEffectiveLevel(self) -> int:
        return _level() if not self.level and os.environ.get("LOGLEVEL") else super().getEffectiveLevel()


logger = logging.getLogger("inc_graph")
logger.__class__ = _FromEnvironment


def __getattr__(name: str) -> Any:
    if name == "level":
        return _level()
    if name == "level_name":
        return logging.getLevelName(_level())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Logger:
    """The package's logger as class methods; a dictionary or list as message takes a line an entry."""

    def get_logger(self) -> logging.Logger:
        """The logger itself."""
        return logger

    @staticmethod
    def log(level: int, message: Any, *args: Any, **kwargs: Any) -> None:
        """Log a message, entry by entry if it is a dictionary, list or tuple."""
        lines = [f"{k}: {v}" for k, v in message.items()] if isinstance(message, dict) else message
        for line in lines if isinstance(lines, list | tuple) else [lines]:
            logger.log(level, line, *args, **kwargs)

    @staticmethod
    def debug(message: Any, *args: Any, **kwargs: Any) -> None:
        """`log` at level debug."""
        Logger.log(logging.DEBUG, message, *args, **kwargs)

    @staticmethod
    def info(message: Any, *args: Any, **kwargs: Any) -> None:
        """`log` at level info."""
        Logger.log(logging.INFO, message, *args, **kwargs)

    @staticmethod
    def warning(message: Any, *args: Any, **kwargs: Any) -> None:
        """`log` at level warning."""
        Logger.log(logging.WARNING, message, *args, **kwargs)

    @staticmethod
    def error(message: Any, *args: Any, **kwargs: Any) -> None:
        """`log` at level error."""
        Logger.log(logging.ERROR, message, *args, **kwargs)

    @staticmethod
    def fatal(message: Any, *args: Any, **kwargs: Any) -> None:
        """`log` at level critical."""
        Logger.log(logging.CRITICAL, message, *args, **kwargs)

    warn, critical = warning, fatal


class TuningLogger:
    """What `autotune` logs of its course."""

    @classmethod
    def tuning_start(cls) -> None:
        logger.info("tuning starts")

    @classmethod
    def trial_start(cls, trial_index: Any = None) -> None:
        logger.info("trial %s starts", trial_index)

    @classmethod
    def quantization_start(cls, stacklevel: int = 2) -> None:
        logger.info("quantization starts", stacklevel=stacklevel)

    @classmethod
    def quantization_end(cls, stacklevel: int = 2) -> None:
        logger.info("quantization ends", stacklevel=stacklevel)

    @classmethod
    def evaluation_start(cls) -> None:
        logger.info("evaluation starts")

    @classmethod
    def evaluation_end(cls) -> None:
        logger.info("evaluation ends")

    @classmethod
    def trial_end(cls, trial_index: Any = None) -> None:
        logger.info("trial %s ends", trial_index)

    @classmethod
    def tuning_end(cls) -> None:
        logger.info("tuning ends")


def dump_elapsed_time(customized_msg: str = "") -> Callable[[F], F]:
    """Decorator: log how long a call takes, in milliseconds."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            what = customized_msg or function.__qualname__
            logger.info("%s elapsed time: %.2f ms", what, (time.perf_counter() - start) * 1e3)
            return result

        return timed  # type: ignore[return-value]

    return wrap


def log_process(mode: Any = "") -> Callable[[F], F]:
    """Decorator: log the start and the end of a call."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def logged(*args: Any, **kwargs: Any) -> Any:
            what = str(getattr(mode, "value", mode)) or function.__qualname__
            logger.info("%s starts", what)
            result = function(*args, **kwargs)
            logger.info("%s ends", what)
            return result

        return logged  # type: ignore[return-value]

    return wrap
