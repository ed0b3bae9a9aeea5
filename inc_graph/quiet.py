"""torch.export without what it writes to stderr beside its exception."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["quiet_torch"]


class _Sieve:
    """A stream that passes on everything but graphs."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        self._dropped = "def forward(self" in text or (self._dropped and text == "\n")
        return len(text) if self._dropped else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Within the block torch prints no graphs and logs nothing to stderr. Set TORCH_LOGS to see all of it.

    The exporter prints the graph that it has so far when it fails. Its reason is in the exception.
    """
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    loggers = [logging.getLogger(n) for n in list(logging.root.manager.loggerDict) if n.split(".")[0] == "torch"]
    handlers = {h for logger in loggers for h in logger.handlers if getattr(h, "stream", None) is sys.stderr}
    levels = {h: h.level for h in handlers}
    try:
        for handler in handlers:
            handler.setLevel(logging.CRITICAL)
        with contextlib.redirect_stderr(_Sieve(sys.stderr)):
            yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)
