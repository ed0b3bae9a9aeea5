"""How much memory the tensors of a model take, whatever library made it."""

from __future__ import annotations

import re
import types
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

__all__ = ["held", "shares"]


def shares(model: nn.Module, before: dict[str, int], layers: str) -> tuple[float, float]:
    """Bytes over those ``before`` (by the names of parameters): of the layers that the pattern finds, and of all."""
    whole = held(model)
    rest = held([t for name, t in [*model.named_parameters(), *model.named_buffers()] if not re.search(layers, name)])
    quantized = sum(size for place, size in whole.items() if place not in rest)
    return (
        quantized / sum(size for name, size in before.items() if re.search(layers, name)),
        sum(whole.values()) / sum(before.values()),
    )


def held(thing: Any) -> dict[int, int]:
    """{address: bytes} of the memory of all tensors that can be reached through attributes, dicts and sequences."""
    seen: dict[int, Any] = {}
    found: dict[int, int] = {}
    todo = [thing]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, type | types.ModuleType | types.FunctionType | fx.Graph | FakeTensor):
            continue
        seen[id(x)] = x
        if isinstance(x, Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, list | tuple | set):
            todo += x
        else:
            todo += vars(x).values() if hasattr(x, "__dict__") else ()
    return found
