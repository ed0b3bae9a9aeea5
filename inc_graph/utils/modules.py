"""Modules by name: find them, replace them, list them; what a model's inputs look like elsewhere."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.common.logger import logger
from inc_graph.errors import IncError

__all__ = [
    "SUPPORTED_LAYERS", "WHITE_MODULE_LIST", "Conv1D", "fetch_module", "forward_wrapper", "get_attr",
    "get_model_device", "get_model_info", "get_module", "get_non_persistent_buffers", "load_non_persistent_buffers",
    "move_input_device", "set_attr", "set_module", "to_device", "to_dtype",
]  # fmt: skip

WHITE_MODULE_LIST = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
"""The classes of layers that `get_model_info` is mostly asked for."""


class _ByName(type):
    """`isinstance` goes by the name and the module of the classes that an object has."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return any((c.__name__, c.__module__) == (cls.__name__, cls.__module__) for c in type(instance).__mro__)


class Conv1D(nn.Module, metaclass=_ByName):
    """Stands for the linear layer of transformers' older models, whether that package is imported, later, or never."""

    __module__ = "transformers.pytorch_utils"


SUPPORTED_LAYERS = [nn.Linear, Conv1D]
"""The classes of layers whose weights alone can be quantized."""


def fetch_module(model: nn.Module, op_name: str) -> Any:
    """The module or tensor `op_name` ("encoder.layers.0.weight"); None, with a warning in the log, if it is missing."""
    found: Any = model
    for name in op_name.split("."):
        if not hasattr(found, name):
            logger.warning("The model has no %s%s", op_name, _nearest(model, op_name))
            return None
        found = getattr(found, name)
    return found


def get_module(module: nn.Module, key: str) -> Any:
    """As `fetch_module`, but nothing is logged."""
    found: Any = module
    for name in key.split("."):
        found = getattr(found, name, None)
    return found


def set_module(model: nn.Module, op_name: str, new_module: Any) -> None:
    """Put a module or tensor in the place of `op_name`, which may be new in a module that exists.

    Raises:
        IncError: the module that would hold it is missing; names the nearest one.
    """
    parent, _, name = op_name.rpartition(".")
    if not name:
        raise IncError(f"cannot set {op_name!r}: it names no part of the model")
    holder = get_module(model, parent) if parent else model
    if holder is None:
        raise IncError(f"cannot set {op_name!r}: the model has no {parent!r}{_nearest(model, parent)}")
    setattr(holder, name, new_module)


get_attr = fetch_module
set_attr = set_module


def _nearest(model: nn.Module, name: str) -> str:
    near = difflib.get_close_matches(name, [n for n, _ in model.named_modules() if n], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def get_model_info(
    model: nn.Module, white_module_list: Iterable[type[nn.Module] | str] | type[nn.Module] | str
) -> list[tuple[str, str]]:
    """(name, class name) of every module of these classes, in the order of the model; a shared module once.

    Args:
        model: Any.
        white_module_list: Classes, or their names; one of them, or several.
    """
    given = [white_module_list] if isinstance(white_module_list, type | str) else list(white_module_list)
    kinds = tuple(k for k in given if isinstance(k, type))
    names = {k for k in given if isinstance(k, str)}
    return [
        (path, type(module).__name__)
        for path, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ in names
    ]


def get_model_device(model: nn.Module) -> str | None:
    """The type of the device of the first parameter ("cpu"), or buffer; None of a model without tensors."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device.type


def get_non_persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the buffers that `state_dict` leaves out."""
    return {
        f"{path}.{name}" if path else name: module._buffers[name]
        for path, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None
    }


def load_non_persistent_buffers(model: nn.Module, non_persistent_buffers: Mapping[str, Tensor]) -> None:
    """Put what `get_non_persistent_buffers` gave into a model of the same structure.

    Raises:
        IncError: a module is missing; the buffers before it are in place then.
    """
    for name, value in non_persistent_buffers.items():
        parent, _, own = name.rpartition(".")
        holder = get_module(model, parent) if parent else model
        if holder is None:
            raise IncError(f"cannot load the buffer {name!r}: the model has no {parent!r}{_nearest(model, parent)}")
        holder.register_buffer(own, value, persistent=False)


# ----------------------------------------------------------------------------------------------------------- of inputs
def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {k: _map(v, change) for k, v in value.items()}
        if type(value) is dict:
            return items
        if not isinstance(value, MutableMapping):
            return type(value)(items)  # type: ignore[call-arg]
        new = copy.copy(value)  # keeps what else it holds, such as a default
        for key, item in items.items():
            new[key] = item
        return new
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, change) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(v, change) for v in value)
    return value


def to_device(input: Any, device: torch.device | str = "cpu") -> Any:
    """Tensors, and the tensors in lists, tuples and mappings, on another device. What is given stays as it is."""
    return _map(input, lambda t: t.to(device))


move_input_device = to_device


def to_dtype(input: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Floating-point tensors, also in lists, tuples and mappings, in another dtype; ids and masks keep theirs."""
    return _map(input, lambda t: t.to(dtype) if t.is_floating_point() else t)


def forward_wrapper(model: nn.Module, input: Any) -> Any:
    """Call a model on one batch, on its own device: a mapping by keyword, a list or tuple by position."""
    input = to_device(input, get_model_device(model) or "cpu")
    if isinstance(input, Mapping):
        return model(**input)
    return model(*input) if isinstance(input, list | tuple) else model(input)
