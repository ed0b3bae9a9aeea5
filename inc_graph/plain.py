"""What torch does where nothing is said, while this library computes: float32, the CPU, no autocast.

A program may have set another default dtype or device, or be inside of an autocast. That is for its own model: scales
and sums are no less exact for it. The program's modules are never run in here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["plain"]


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within, torch has its own defaults."""
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield
