"""What is not finite in training: gradients are looked at on their way back, the loss where the user asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inc_graph.errors import TrainingError

__all__ = ["check_loss", "refuse_bad_gradients"]


def refuse_bad_gradients(y: Tensor, path: str, guard: Any = None) -> None:
    """Let the backward pass refuse a gradient of `y` that is not finite, before any optimizer can use it.

    Not where float16 is computed in: a gradient scaler lets such a step overflow, and drops it. `path` is "" for the
    output of the model; `guard.clear()` drops the gradients that are there by then.
    """
    kind = y.device.type
    half = kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if not y.requires_grad or y.dtype == torch.float16 or half:
        return

    def look(grad: Tensor) -> None:
        if bool(grad.isfinite().all()):
            return
        if guard is not None:
            guard.clear()
        where = "the layer" if path else "the model's output"
        hint = (
            "it began behind this layer, and not behind the next one that is quantized"
            if path
            else "the loss is NaN or infinite: take smaller steps, or look at the batch and the loss"
        )
        raise TrainingError(f"the gradient that comes back to {where} is not finite", module=path, hint=hint)

    y.register_hook(look)
    if not path:  # the last layer may look at the same tensor: it comes after, so that the loss is named
        hooks: Any = y._backward_hooks
        for key in list(hooks)[:-1]:
            hooks[key] = hooks.pop(key)


def check_loss(loss: Tensor) -> Tensor:
    """The loss itself, if all of it is finite.

    A NaN or an infinite number that was only added to a loss has finite gradients: no layer and no gradient shows it,
    and training would go on. Say ``check_loss(loss).backward()`` where that can happen. Under `torch.compile` it is
    passed on as it is.

    Raises:
        TrainingError: it is not finite; no gradient has been computed then.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a tensor, not {type(loss).__name__}: look at it before it is made a number")
    if torch.compiler.is_compiling() or loss.is_meta or bool(loss.detach().isfinite().all()):
        return loss
    value = f"{float(loss.detach()):g}" if loss.numel() == 1 else "not finite"
    hint = "look at the batch, and at what is added to the loss; the model's own results are checked in its layers"
    raise TrainingError(f"the loss is {value}", hint=hint)
