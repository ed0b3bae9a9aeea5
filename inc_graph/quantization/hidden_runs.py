"""Runs of a model that its user does not know of: they leave its buffers as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from inc_graph.quantization.leaf import Leaf

__all__ = ["Buffers", "no_fakes_left", "unseen"]


class Buffers:
    """The buffers of a model as they are now; those of quantized layers are not the model's."""

    def __init__(self, model: nn.Module) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._kept = [
                (module, name, buffer, None if buffer is None else buffer.detach().clone())
                for module in _own_modules(model)
                for name, buffer in module._buffers.items()
            ]

    def restore(self) -> None:
        """Put the values back, each into the tensor that held it."""
        for module, name, buffer, value in self._kept:
            if buffer is not None and value is not None and not _same(buffer, value):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.resize_(value.shape).copy_(value)
            module._buffers[name] = buffer


@contextlib.contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """What runs here changes no buffer for good."""
    before = Buffers(model)
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def no_fakes_left(model: nn.Module) -> Iterator[None]:
    """Tensors without values that a model notes in its attributes are taken back."""
    states = [(state, dict(state)) for module in _own_modules(model) for state in (vars(module), module._buffers)]
    try:
        yield
    finally:
        for state, before in states:
            for name in [k for k, v in state.items() if isinstance(v, FakeTensor)]:
                if name in before:
                    state[name] = before[name]
                else:
                    del state[name]


def _own_modules(module: nn.Module, seen: set[nn.Module] | None = None) -> Iterator[nn.Module]:
    seen = set() if seen is None else seen
    if isinstance(module, Leaf) or module in seen:
        return
    seen.add(module)
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _own_modules(child, seen)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_meta:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    same: Any = torch.equal(a, b)
    return bool(same)
