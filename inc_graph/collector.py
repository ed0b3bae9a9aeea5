"""Python's cyclic garbage collector, out of the way of work that makes many objects and no garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused"]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Within the block (or as a decorator) no cyclic garbage is looked for.

    Graphs are copied, and code is generated for them, by making millions of objects that all stay: the collector would
    walk through all of them again and again, a fifth of the time of a large graph, and find nothing. Where it is off
    already it stays off. Not for code that runs models: what a tensor holds would be kept longer than needed.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
