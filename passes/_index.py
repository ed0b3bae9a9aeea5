"""A scale of channels, as an index: which channel's scale divides each element of a value.

int64, with the value's rank; a dimension on which it does not depend has size 1; -1 marks elements that nobody has
asked for. So views and permutations of the value are views and permutations of its index. Along a dimension whose size
is not known it may have a period (see `_index_views`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.graph import is_float, shape

__all__ = [
    "NoWeight", "Rule", "Tie", "Way", "all_ints", "dims_of", "fitted", "joined", "name_of", "only", "overloads", "same",
]  # fmt: skip

aten = torch.ops.aten


Tie = tuple[Tensor, Tensor]  # channels that need one scale: two index tensors of one shape


@dataclass
class Way:
    """Inputs that have to be scaled, all of them, and channels that need one scale then."""

    inputs: list[tuple[fx.Node, Tensor]]
    ties: list[Tie] = field(default_factory=list)


class NoWeight(str):
    """Why a norm cannot take a scale in that would, had it a weight."""


Rule = Callable[[fx.Node, Tensor], "list[Way] | str"]


def name_of(node: fx.Node) -> str:
    """A node, for messages."""
    if node.op == "placeholder":
        return f"the input {node.name} of the model"
    schema = getattr(node.target, "_schema", None)
    return f"{node.name} ({'' if schema is None else schema.name.removeprefix('aten::')})"


def all_ints(sizes: Sequence[Any]) -> bool:
    """Whether all sizes are known."""
    return all(isinstance(n, int) for n in sizes)


def dims_of(node: fx.Node) -> list[Any]:
    """The sizes of a value."""
    return list(shape(node) or ())


def only(index: Tensor, *dims: int) -> bool:
    """Whether the scale depends on none but these dimensions."""
    rank = index.ndim
    return all(n == 1 for d, n in enumerate(index.shape) if d not in [k % rank for k in dims])


def overloads(*names: str) -> list[Any]:
    """All overloads of aten operators."""
    return [getattr(getattr(aten, name), o) for name in names for o in getattr(aten, name).overloads()]


# ---------------------------------------------------------------------------------------------------- broadcasting
def fitted(index: Tensor, value: fx.Node, outer: Sequence[Any]) -> Way | str:
    """An index of a result, for an input that is broadcast against it. A constant may be expanded instead.

    Args:
        outer: Sizes of the result, for each dimension of the index: one that is not known is that of the input, too.
    """
    sizes = dims_of(value)
    ties: list[Tie] = []
    constant = value.op == "get_attr"
    while index.ndim > len(sizes) and (index.shape[0] == 1 or not constant):
        first = index[:1]
        ties += [(first.expand_as(index), index)] if index.shape[0] > 1 else []
        index = first[0]
    for d, (n, whole) in enumerate(zip(sizes, outer[-len(sizes) :], strict=True) if index.ndim == len(sizes) else ()):
        if index.shape[d] == 1 or constant or str(n) == str(whole):
            continue
        if not isinstance(n, int) or n != 1:
            return f"the shape of {value.name} is not known"
        first = index.narrow(d, 0, 1)
        ties.append((first.expand_as(index), index))
        index = first
    return Way([(value, index)], ties)


def joined(parts: Sequence[Way | str]) -> list[Way] | str:
    """All of the parts in one way."""
    found = Way([])
    for part in parts:
        if isinstance(part, str):
            return part
        found.inputs += part.inputs
        found.ties += part.ties
    return [found]


def same(node: fx.Node, index: Tensor) -> list[Way] | str:
    """The rule of what treats each element alike: its input is scaled as its result."""
    source: Any = node.args[0]
    return [Way([(source, index)])] if is_float(source) else f"{source.name} is not floating point"
