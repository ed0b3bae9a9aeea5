"""How a scale of the channels of a value reads further up: what each operator's inputs have to be scaled by.

A scale of a value is written as an index (see `_index`).

`ways(node, index)` says for the operators that commute with such a scale which inputs, scaled how, give the scaled
result. f(x / s) = f(x) / s holds for

    moves (view, permute, slice, cat, expand), casts, sums over other dimensions, pooling, relu and what else is
    positively homogeneous, products (either factor; a of glu = a sigmoid(b)), sums (all addends), attention (of its
    values), einsum (of one operand),
    linear and convolution (of the weight's rows and the bias), norms with a weight (weight and bias), lookups (table)

and not for gelu, silu, softmax or a norm without a weight. Where one input element is read in several places (heads
that are repeated), the scales of these have to be equal: those are the ties. An operator may read one value in several
of its places, too: then there is a way only if all of these places are scaled, and what each of them wants is one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx

from inc_graph.passes import _index_layers, _index_moves, _index_values
from inc_graph.passes._index import NoWeight, Tie, Way, name_of
from inc_graph.passes._index_moves import SPLITS, TUPLES, positions

__all__ = ["TUPLES", "NoWeight", "Tie", "Way", "places", "readers", "ways"]

_RULES = {**_index_values.RULES, **_index_moves.RULES, **_index_layers.RULES}


def ways(node: fx.Node, index: Tensor) -> list[Way] | str:
    """The ways to get the result of `node` scaled by `index`, or why there is none."""
    if (rule := _RULES.get(node.target)) is None:
        return f"{name_of(node)} does not commute with a scale of its channels"
    found = rule(node, index)
    if isinstance(found, str):
        return found
    good = [way for way in found if all(_everywhere(node, source, way) for source, _ in way.inputs)]
    return good or f"{name_of(node)} reads one value in several places, which are not all scaled alike"


def _everywhere(node: fx.Node, source: fx.Node, way: Way) -> bool:
    """Whether a way scales a value in all places where an operator reads it."""
    return places(node, source) <= sum(value is source for value, _ in way.inputs)


def places(node: fx.Node, source: fx.Node) -> int:
    """In how many places an operator reads a value."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found.count(source)


def readers(value: fx.Node) -> Iterator[tuple[fx.Node, Tensor | None]]:
    """(reader, the positions that it reads if these are a part of the value) of each user, in the order of the graph.

    Positions are a bool tensor that broadcasts against the value. What splits a value stands for its parts.
    """
    for user in value.users:
        if user.target in SPLITS:
            for part in user.users:
                yield part, positions(value, part)
        else:
            yield user, positions(value, user)
