"""What stands in a graph's arguments, as JSON: numbers, names, dtypes, devices, nested; and nothing else.

A plain JSON value stands for itself; a list for a list. All else is an object with one key that says what it is:
{"node": name}, {"tuple": [...]}, {"dict": [[key, value], ...]}, {"slice": [...]}, {"float": "inf"},
{"complex": [re, im]}, {"dtype": "float32"}, {"device": "cpu"}, {"layout": "strided"},
{"memory_format": "channels_last"}, {"ellipsis": true}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from inc_graph.errors import SavedModelError

__all__ = ["DTYPES", "decode", "dtype_of", "encode"]

DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_LAYOUTS = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.layout)}
_FORMATS = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.memory_format)}
_ELLIPSIS = "ellipsis"


def encode(value: Any) -> Any:
    """JSON-able form. SavedModelError for what has none."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if value is Ellipsis:
        return {_ELLIPSIS: True}
    for kind, plain in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        if isinstance(value, plain):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise SavedModelError(f"{value!r} ({type(value).__name__}) cannot be saved")


def decode(data: Any, node: Callable[[str], fx.Node] | None = None, device: torch.device | None = None) -> Any:
    """Inverse of `encode`.

    Args:
        data: From JSON.
        node: Gives the node of a name; without it nodes are errors.
        device: Stands in for every device that was saved.

    Raises:
        SavedModelError: it is no such form.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [decode(v, node, device) for v in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise SavedModelError(f"not a value: {_short(data)}")
    ((kind, inner),) = data.items()
    if kind == "node" and node is not None and isinstance(inner, str):
        return node(inner)
    if kind in ("tuple", "slice", "complex") and isinstance(inner, list):
        parts = [decode(v, node, device) for v in inner]
        if kind == "tuple":
            return tuple(parts)
        if kind == "slice" and len(parts) == 3:
            return slice(*parts)
        if kind == "complex" and len(parts) == 2 and all(isinstance(p, int | float) for p in parts):
            return complex(*parts)
    if kind == "dict" and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
        pairs = [(decode(k, node, device), decode(v, node, device)) for k, v in inner]
        if all(k is None or isinstance(k, bool | int | float | str | torch.dtype) for k, _ in pairs):
            return dict(pairs)
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == _ELLIPSIS:
        return Ellipsis
    for name, table in (("dtype", DTYPES), ("layout", _LAYOUTS), ("memory_format", _FORMATS)):
        if kind == name and isinstance(inner, str) and inner in table:
            return table[inner]
    if kind == "device" and isinstance(inner, str):
        return device if device is not None else _device(inner)
    raise SavedModelError(f"not a value: {_short(data)}")


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of a name such as "float32". SavedModelError if there is none."""
    if not isinstance(name, str) or name not in DTYPES:
        raise SavedModelError(f"not a dtype of this torch: {_short(name)}", hint="a newer torch may have it")
    return DTYPES[name]


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as e:
        raise SavedModelError(f"not a device of this torch: {_short(text)}") from e


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
