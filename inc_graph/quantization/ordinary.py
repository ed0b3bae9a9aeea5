"""Work within `torch.inference_mode()` that makes ordinary tensors: such as autograd and adapters can take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["ordinary_tensors"]


@contextlib.contextmanager
def ordinary_tensors(model: Any) -> Iterator[None]:
    """Leave inference mode, if it is on; without gradients, as there.

    A model that was made in inference mode has inference tensors itself, which cannot be worked with outside of it: for
    such a one nothing is done.
    """
    if not torch.is_inference_mode_enabled() or (isinstance(model, nn.Module) and _made_there(model)):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _made_there(model: nn.Module) -> bool:
    return any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
