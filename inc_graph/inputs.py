"""What a captured graph takes: described when it is captured, checked on each call.

A graph computes nonsense, or fails deep inside, on inputs that it was not captured for. A forward pre-hook therefore
compares kinds, shapes and constants first, and says what is wrong in the words of the caller.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from inc_graph.errors import CaptureError
from inc_graph.graph import get_level, is_contiguous, val

__all__ = ["check_inputs", "describe_inputs", "watch_inputs"]

aten = torch.ops.aten

_ABSENT = "\0absent"  # an argument that the call leaves out


def describe_inputs(gm: fx.GraphModule, ranges: Any, model: nn.Module) -> dict[str, Any]:
    """{"leaves": [...], "ranges": {symbol: [low, high]}, "optional": [...]}, JSON-able.

    "optional" are arguments captured as None where the model's own default is None: a call may leave them out.
    """
    described: list[dict[str, Any]] = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = val(node)
        if isinstance(value, torch.Tensor):
            sizes = [d if isinstance(d, int) else str(d) for d in value.shape]
            leaf = {"name": node.name, "shape": sizes, "form": _form(value)}
            if is_contiguous(value) and not any(u.target is aten.copy_.default for u in node.users):
                leaf["contiguous"] = True
            described.append(leaf)
        elif value is None or isinstance(value, int | float | str | bool):
            described.append({"name": node.name, "value": value})
        else:
            described.append({"name": node.name})
    limits = {}
    for symbol, bound in ranges.items():
        ends = (bound.lower, bound.upper)  # sympy numbers; None stands for infinite
        limits[str(symbol)] = [int(e) if getattr(e, "is_Integer", isinstance(e, int)) else None for e in ends]
    nothing = {d["name"] for d in described if d.get("value", _ABSENT) is None}
    optional = [p.name for p in _parameters(model) if p.default is None and p.name in nothing]
    return {"leaves": described, "ranges": limits, "optional": optional}


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # no signature
        return []


def _form(x: Any) -> str:
    """dtype and layout of a tensor, such as "float32 strided"; the class of anything else."""
    return f"{x.dtype} {x.layout}".replace("torch.", "") if isinstance(x, torch.Tensor) else type(x).__name__


# ------------------------------------------------------------------------------------------------------------- checks
def watch_inputs(gm: fx.GraphModule) -> None:
    """Install `check_inputs`; copies of the graph module have to be given it again."""
    gm.register_forward_pre_hook(check_inputs, with_kwargs=True)


def check_inputs(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: fills in optional arguments, and gives inputs that were contiguous when they were captured so.
    CaptureError on inputs that the graph was not captured for."""
    if torch.compiler.is_compiling():  # the compiler has guards of its own
        return None
    info = getattr(gm.graph._codegen, "pytree_info", None)
    inputs = gm.meta.get("inc", {}).get("inputs")
    if info is None or inputs is None:
        return None
    names = list(info.orig_args)
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    filled = {n: None for n in inputs.get("optional", ()) if n in names and n not in bound}
    bound.update(filled)
    if len(args) > len(names) or set(bound) != set(names):
        return None  # forward() itself says which argument is missing or unknown
    flat = pytree.tree_leaves([bound[n] for n in names])  # positional ones first, then keywords as captured
    moved: dict[int, torch.Tensor] = {}
    if len(flat) == len(inputs["leaves"]):
        with _unrecorded():
            _check_leaves(inputs, flat)
        if get_level(gm) != "lowered":  # a backend's graph takes any layout
            moved = {id(x): x.contiguous() for leaf, x in zip(inputs["leaves"], flat, strict=True) if _strided(leaf, x)}
    if moved:  # the views of the graph are those of the layout that it was captured with
        args, kwargs = pytree.tree_map(lambda x: moved.get(id(x), x), (args, kwargs))
    return (args, {**kwargs, **filled}) if filled or moved else None


@contextlib.contextmanager
def _unrecorded() -> Iterator[None]:
    """Sizes are numbers in here: torch.jit.trace makes tensors of them, and records what is asked of these."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    put: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    put(None)
    try:
        yield
    finally:
        put(state)


def _strided(leaf: dict[str, Any], x: Any) -> bool:
    return leaf.get("contiguous", False) and not x.is_contiguous()


def _check_leaves(inputs: dict[str, Any], flat: list[Any]) -> None:
    sizes: dict[str, int] = {}
    for leaf, got in zip(inputs["leaves"], flat, strict=True):
        if "value" in leaf and (isinstance(got, torch.Tensor) or got != leaf["value"]):
            what = f"a tensor of shape {list(got.shape)}" if isinstance(got, torch.Tensor) else repr(got)
            raise CaptureError(
                f"input {leaf['name']!r} was captured as the constant {leaf['value']!r}, got {what}",
                hint="capture the model again with such a value",
            )
        if "shape" not in leaf:
            continue
        if _form(got) != leaf["form"]:
            what = f"input {leaf['name']!r} is {_form(got)}, the model was captured for {leaf['form']}"
            raise CaptureError(what, hint="convert the input, or capture the model again with inputs of this kind")
        if got.device.type == "meta":
            raise CaptureError(f"input {leaf['name']!r} is on the meta device", hint="give inputs with values")
        _check_shape(leaf, list(got.shape), inputs["ranges"], sizes)


def _check_shape(leaf: dict[str, Any], have: list[int], ranges: dict[str, Any], sizes: dict[str, int]) -> None:
    """`sizes` are those that the symbols have in this call, as far as inputs have told."""
    want = leaf["shape"]
    fits, allowed, agree = len(want) == len(have), True, True
    for w, h in zip(want, have, strict=False):
        if not isinstance(w, str):
            fits &= w == h
            continue
        low, high = ranges.get(w, (None, None))
        allowed &= (low is None or h >= low or low == 2) and (high is None or h <= high)
        if w.isidentifier():
            agree &= sizes.setdefault(w, h) == h
    if fits and allowed and agree:
        return
    shown = ", ".join(_size(w, ranges) for w in want)
    message = f"input {leaf['name']!r} has shape {have}, the model was captured for [{shown}]"
    if not fits:
        hint = "capture it again with example inputs of this shape, or with dynamic_shapes for what changes"
    elif not allowed:
        hint = "give sizes within these bounds, or capture it again with a Dim(min=..., max=...) that allows this one"
    else:
        same = ", ".join(f"{_size(w, ranges)} is {sizes[w]}" for w in dict.fromkeys(want) if w in sizes)
        hint = f"dimensions that were captured as one must have one size; in this call {same}"
    raise CaptureError(message, hint=hint)


def _size(want: int | str, ranges: dict[str, Any]) -> str:
    """4; "s0 (2..8)" or "s0 (2 or more)" for a dimension that may vary."""
    if want not in ranges:
        return str(want)
    low, high = ranges[str(want)]
    if high is None:
        return f"{want} (any size)" if low in (None, 0, 1, 2) else f"{want} ({low} or more)"
    return f"{want} ({low or 0}..{high})"
