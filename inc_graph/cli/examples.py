"""Random inputs for a graph, made after what it says of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from inc_graph.errors import CaptureError
from inc_graph.graph import val

__all__ = ["example_of_graph"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def example_of_graph(gm: fx.GraphModule) -> Call:
    """(positional, keyword) inputs. CaptureError if the graph does not say what it takes.

    Floats are normally distributed; integers are 1, which nearly every table has a row for, and every mask takes.
    """
    inputs = gm.meta.get("inc", {}).get("inputs")
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if not isinstance(inputs, dict) or info is None:
        raise CaptureError("the graph does not say what inputs it takes", hint="check it without running it")
    sizes: dict[Any, int] = {}
    generator = torch.Generator().manual_seed(0)
    flat = []
    for node, leaf in zip(gm.graph.find_nodes(op="placeholder"), inputs["leaves"], strict=True):
        if "shape" in leaf:
            value = val(node)
            shape = [_size(d, inputs.get("ranges", {}), sizes) for d in value.shape]
            flat.append(_random(shape, value.dtype, generator))
        elif "value" in leaf:
            flat.append(leaf["value"])
        else:
            raise CaptureError(f"what input {leaf['name']!r} may be is not known", hint="check it without running it")
    args, kwargs = pytree.tree_unflatten(flat, info.in_spec)
    return tuple(args), dict(kwargs)


def _size(dim: Any, ranges: dict[str, Any], sizes: dict[Any, int]) -> int:
    """A dimension. One that may vary is as it was captured; where that is not known, 3 or what is nearest."""
    if isinstance(dim, int):
        return dim
    if dim.node.hint is not None:
        return int(dim.node.hint)
    expression = dim.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        low, high = ranges.get(str(symbol), (None, None))
        sizes.setdefault(symbol, min(max(3, low or 0), 3 if high is None else max(high, 1)))
    return int(expression.xreplace(sizes))


def _random(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype)
