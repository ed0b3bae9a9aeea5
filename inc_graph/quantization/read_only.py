"""The float weight of a quantized layer: computed when its values are needed, and not for its shape or dtype alone.

Models ask each layer for `weight.dtype` at each call, and adapters for shapes. Writing to such a tensor would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from inc_graph.errors import IncError

__all__ = ["ReadOnly"]

_FACTS = {
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "is_leaf", "grad")
} | {getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex")}
_HARMLESS = ("requires_grad_", "detach_")
_WRITES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class ReadOnly(torch.Tensor):
    """A tensor that refuses to be written to, also by `weight.data = ...`. What is computed from it is a plain one."""

    _values: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, values: Callable[[], Tensor]) -> ReadOnly:
        """What `values()` will give, which has shape, dtype and device of `like`."""
        made: ReadOnly = torch.Tensor._make_wrapper_subclass(ReadOnly, like.shape, dtype=like.dtype, device=like.device)
        made._values = values
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
        replaced = func == torch.Tensor.data.__set__  # type: ignore[attr-defined]
        if args and isinstance(args[0], cls) and (in_place or replaced or name in _WRITES):
            message = "the weight of a quantized layer cannot be written to, nor an adapter merged into it"
            hint = "keep the adapter beside the layer, or merge it into the float model and quantize that again"
            raise IncError(message, hint=hint)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS:
                return func(*args, **(kwargs or {}))
            return func(*_plain(args), **_plain(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_plain(args), **_plain(kwargs or {}))


def _plain(values: Any) -> Any:
    with torch.no_grad():
        return pytree.tree_map(lambda x: x._values().detach() if isinstance(x, ReadOnly) else x, values)
