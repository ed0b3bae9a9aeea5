"""Many calls of one function that wait for each other: all of them up to a place, then all of them up to the next.

Each call is a greenlet: it keeps its place in the Python code that it is in (a model's forward, several calls deep),
and costs nothing while it waits. All of them run in one thread, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

__all__ = ["Lockstep"]


class Lockstep:
    """Calls `run(0)`, `run(1)`, ..., each of which calls `pause` where it is to wait.

    Args:
        run: The function. A call that has ended gives `()` at the steps that others still take.
        count: How many calls.
    """

    def __init__(self, run: Callable[[int], Any], count: int) -> None:
        from greenlet import greenlet

        self._calls = [greenlet(partial(run, i)) for i in range(count)]

    def step(self) -> list[Any]:
        """Let every call go on to its next pause, or to its end; what it pauses with, or gives."""
        return [call.switch() for call in self._calls]

    def pause(self, value: Any) -> None:
        """To be called from inside of a call: wait for the next `step`."""
        from greenlet import getcurrent

        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        getcurrent().parent.switch(value)
        torch.set_grad_enabled(modes[0])  # a region of the model's, which the calls between may have left
        torch.set_autocast_enabled("cpu", modes[1])
        torch.set_autocast_dtype("cpu", modes[2])

    def current(self) -> Any:
        """Stands for the call that runs at this moment."""
        from greenlet import getcurrent

        return getcurrent()

    @property
    def done(self) -> bool:
        """Whether all calls have ended."""
        return all(call.dead for call in self._calls)

    def close(self) -> None:
        """End calls that still wait."""
        for call in self._calls:
            if call and not call.dead:
                call.throw()
