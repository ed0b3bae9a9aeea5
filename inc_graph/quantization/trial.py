"""One run of the float model that leaves no trace: does it take these inputs at all?

When a model cannot be exported, the reason may be the model or the inputs. Only the model itself can tell, so it is run
once, and what the run changes is put back: tensors that are written to, attributes, and the state of the generators.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from inc_graph.graph import storage_key

__all__ = ["why_refused"]


def why_refused(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """What the model raises on these inputs, None if it takes them. Model, inputs and generators are as before."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    state = random.getstate()
    refusal: Exception | None = None
    for grad in sorted({False, torch.is_grad_enabled()}):  # with gradients only if the model needs them to run
        try:
            with torch.random.fork_rng(devices), _attributes_kept(model), torch.set_grad_enabled(grad), _Undo(tensors):
                model(*args, **kwargs)
            return None
        except Exception as e:
            refusal = e
        finally:
            random.setstate(state)
    return refusal


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Attributes of the modules, and the lists, dictionaries and sets that they hold, are as before after the block."""
    kept: list[tuple[Any, Any]] = []
    for module in list(model.modules()):
        tables = [v for v in vars(module).values() if type(v) in (list, dict, set)]
        kept += [(table, table.copy()) for table in tables]
        kept.append((module.__dict__, module.__dict__.copy()))
    try:
        yield
    finally:
        for table, before in kept:
            if isinstance(table, list):
                table[:] = before
            else:
                table.clear()
                table.update(before)


class _Undo(TorchDispatchMode):
    """Keeps a copy of the memory of given tensors from before the first write to it, and puts it back at the end."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._watched = {storage_key(t) for t in tensors}
        self._before: dict[Any, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, a in enumerate(func._schema.arguments):
                if a.alias_info is not None and a.alias_info.is_write:
                    value = args[i] if i < len(args) else kwargs.get(a.name)
                    for t in value if isinstance(value, list | tuple) else [value]:
                        self._note(t)
        return func(*args, **kwargs)

    def _note(self, t: Any) -> None:
        if isinstance(t, Tensor) and (key := storage_key(t)) in self._watched and key not in self._before:
            memory = t.untyped_storage()
            self._before[key] = (memory, memory.clone())

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for memory, before in self._before.values():
            memory.copy_(before)
