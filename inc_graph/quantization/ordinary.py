"""Work within `torch.inference_mode()` that is to make ordinary tensors: such as autograd, `to` and adapters can take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["makes_ordinary_tensors"]

F = TypeVar("F", bound=Callable[..., Any])


def makes_ordinary_tensors(function: F) -> F:
    """Have a function leave inference mode while it runs; without gradients, as there.

    A model that was made in inference mode has inference tensors itself, which cannot be worked with outside of it: it
    is left as it is.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        models = [x for x in (*args, *kwargs.values()) if isinstance(x, nn.Module)]
        with contextlib.nullcontext() if any(map(_made_there, models)) else _left():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@contextlib.contextmanager
def _left() -> Iterator[None]:
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _made_there(model: nn.Module) -> bool:
    return any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
