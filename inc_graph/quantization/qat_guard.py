"""What surrounds a forward and a backward of a model in training.

What is refused leaves it as it was: its observers, its running statistics, its gradients.

    forward    refused: ranges, learned scales that had just begun, and batch norms are set back
    backward   the gradient of the model's output is looked at before that of any layer; once one is refused, no
               parameter keeps a gradient

And a part of it that is in eval mode takes its first range in a forward of the whole that is in train mode: who freezes
a backbone before training wants it quantized. Nothing is done under `torch.compile`, where nothing is refused.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inc_graph.errors import TrainingError
from inc_graph.fake_quantizer import FakeQuantizer
from inc_graph.finite import refuse_bad_gradients

__all__ = ["guard", "unguard"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Guard:
    """Shared by a model and its quantizers. Copies forget which model it was, until that runs."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.model: weakref.ref[nn.Module] | None = None
        self.before: list[tuple[Tensor, Tensor]] = []  # (state, what it was)

    def __getstate__(self) -> dict[str, Any]:
        return {"refuses": self.refuses, "model": None, "before": []}

    def begin(self, model: nn.Module, args: Any) -> None:
        """Before a forward."""
        if torch.compiler.is_compiling():
            return
        self.model = weakref.ref(model)
        for quantizer in _quantizers(model):
            quantizer.begins = model.training
        if self.refuses and model.training:
            self.before = [(t, t.detach().clone()) for t in _moving(model) if not t.is_meta]

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """After it, refused or not."""
        if torch.compiler.is_compiling():
            return
        before, self.before = self.before, []
        for quantizer in _quantizers(model):
            quantizer.begins = False
        if not self.refuses:
            return
        if output is None and isinstance(sys.exc_info()[1], TrainingError):
            with torch.no_grad():
                for state, value in before:
                    state.copy_(value)
            for quantizer in _quantizers(model):
                quantizer.settle()
        for y in pytree.tree_leaves(output):
            if isinstance(y, Tensor):
                refuse_bad_gradients(y, "", self)

    def clear(self) -> None:
        """Drop all gradients of the model."""
        model = None if self.model is None else self.model()
        if model is not None:
            model.zero_grad()


def guard(model: nn.Module) -> None:
    """Watch a prepared model; a graph once more for each copy, which is not given such hooks."""
    unguard(model)
    watched = [q for q in _quantizers(model) if q.check]
    made = _Guard(bool(watched))
    for quantizer in watched:
        quantizer.guard = made
    model.register_forward_pre_hook(made.begin)
    model.register_forward_hook(made.end, always_call=True)


def unguard(model: nn.Module) -> None:
    """Watch it no more."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Guard)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _quantizers(model: nn.Module) -> list[FakeQuantizer]:
    return [m for m in model.modules() if isinstance(m, FakeQuantizer)]


def _moving(model: nn.Module) -> list[Tensor]:
    """What a forward moves."""
    found = [t for q in _quantizers(model) for t in q.moving()]
    return found + [b for name, b in model.named_buffers() if name.rpartition(".")[2] in _STATISTICS]
