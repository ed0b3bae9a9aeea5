"""How a scale of channels reads further up: views, permutations, parts of a value, and what is put together of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.oppattern import argument
from inc_graph.passes._index import (
    Rule,
    Tie,
    Way,
    all_ints,
    dims_of,
    fitted,
    joined,
    name_of,
    overloads,
    same,
)
from inc_graph.passes._index_views import reshaped

__all__ = ["RULES", "SPLITS", "TUPLES", "part_of", "positions"]

aten = torch.ops.aten


def _reshape(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    found = reshaped(index, dims_of(source), dims_of(node))
    return [Way([(source, found)])] if found is not None else f"{name_of(node)} mixes channels with other dimensions"


def _moved(move: Callable[[fx.Node, Tensor], Tensor]) -> Rule:
    """A rule for what is undone by a move of the index."""

    def rule(node: fx.Node, index: Tensor) -> list[Way] | str:
        source: Any = node.args[0]
        return [Way([(source, move(node, index))])]

    return rule


def _back(node: fx.Node, index: Tensor) -> Tensor:
    order: Any = node.args[1]
    rank = index.ndim
    return index.permute([[d % rank for d in order].index(k) for k in range(rank)])


def _squeezed(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    found = reshaped(index, dims_of(source), dims_of(node))
    return _reshape(node, index) if found is not None else f"{name_of(node)} drops a dimension of unknown size"


def _unsqueezed(node: fx.Node, index: Tensor) -> Tensor:
    return index.squeeze(node.args[1] % index.ndim)  # type: ignore[operator]


def _expand(node: fx.Node, index: Tensor) -> list[Way] | str:
    return joined([fitted(index, node.args[0], dims_of(node))])  # type: ignore[arg-type]


def _repeat_interleave(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    times, d = argument(node, 1), argument(node, 2)
    if d is None or not isinstance(times, int):
        return f"{name_of(node)} repeats all elements"
    if index.shape[d] == 1:
        return [Way([(source, index)])]
    parts = index.unflatten(d, (-1, times)).movedim(d % index.ndim + 1, 0)
    return [Way([(source, parts[0])], [(parts[0].expand_as(parts), parts)])]


def _repeat(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    sizes, times = dims_of(source), list(node.args[1])  # type: ignore[call-overload]
    if len(times) != len(sizes):
        return f"{name_of(node)} adds dimensions"
    ties: list[Tie] = []
    for d, (n, k) in enumerate(zip(sizes, times, strict=True)):
        if index.shape[d] > 1 and k != 1:
            if not isinstance(n, int) or not isinstance(k, int):
                return f"the shape of {source.name} is not known"
            parts = index.unflatten(d, (k, n)).movedim(d, 0)
            ties.append((parts[0].expand_as(parts), parts))
            index = parts[0]
    return [Way([(source, index)], ties)]


def _swap(node: fx.Node, index: Tensor) -> Tensor:
    return index.transpose(*node.args[1:3]) if node.target is aten.transpose.int else index.t()  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- parts of a value
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)


TUPLES = (aten._native_batch_norm_legit_no_training.default,)
"""Operators that give a tuple, of which the first part is what counts; an index of the tuple is one of that."""


def _cut(value: fx.Node, node: fx.Node) -> tuple[int, Any, bool] | None:
    """(dimension, indices or slice, whether the dimension goes) of what reads a part of a value; None for others."""
    if node.target is aten.slice.Tensor:
        d, start, end, step = (argument(node, i) for i in range(1, 5))
        return d, slice(start, end, step), False
    if node.target is aten.select.int:
        return node.args[1], node.args[2], True  # type: ignore[return-value]
    if node.target is aten.narrow.default:
        d, start, length = node.args[1:4]
        return d, slice(start, start + length), False  # type: ignore[operator, return-value]
    if node.target is operator.getitem and (split := node.args[0]).target in SPLITS:  # type: ignore[union-attr]
        number: Any = node.args[1]
        if split.target is aten.unbind.int:  # type: ignore[union-attr]
            return argument(split, 1), number, True  # type: ignore[arg-type]
        d = argument(split, 2)  # type: ignore[arg-type]
        lengths = [v.shape[d] for v in split.meta["val"]]  # type: ignore[union-attr]
        if not all_ints(lengths):
            return None
        start = sum(lengths[:number])
        return d, slice(start, start + lengths[number]), False
    return None


def positions(value: fx.Node, reader: fx.Node) -> Tensor | None:
    cut = _cut(value, reader)
    if cut is None:
        return None
    d, which, _ = cut
    sizes = dims_of(value)
    if not isinstance(sizes[d], int):
        return None
    found = torch.zeros(sizes[d], dtype=torch.bool)
    try:
        found[which] = True
    except TypeError:  # a size that is not known
        return None
    return found.view([-1 if k == d % len(sizes) else 1 for k in range(len(sizes))])


def part_of(node: fx.Node, index: Tensor) -> list[Way] | str:
    """Of what reads a part: the whole value is scaled, or that part of it."""
    source: Any = node.args[0]
    if source.target in TUPLES and node.args[1] == 0:
        return [Way([(source, index)])]
    if source.target in SPLITS:
        source = source.args[0]
    cut = _cut(source, node)
    if cut is None:
        return f"{name_of(node)} does not commute with a scale of its channels"
    d, which, goes = cut
    d %= len(dims_of(source))
    size = dims_of(source)[d]
    inner = index.unsqueeze(d) if goes else index
    found = [Way([(source, inner)])] if inner.shape[d] == 1 else []
    if isinstance(size, int):
        part = torch.full([size if k == d else n for k, n in enumerate(inner.shape)], -1)
        at = (slice(None),) * d + ((slice(which, which + 1) if which != -1 else slice(-1, None)) if goes else which,)
        try:
            part[at] = inner
        except (TypeError, RuntimeError):
            return found or f"the shape of {source.name} is not known"
        found.append(Way([(source, part)]))
    return found or f"the shape of {source.name} is not known"


def _cat(node: fx.Node, index: Tensor) -> list[Way] | str:
    parts: Any = node.args[0]
    d = argument(node, 1) % index.ndim
    if index.shape[d] == 1:
        return [Way([(x, index) for x in parts])]
    lengths = [dims_of(x)[d] for x in parts]
    if not all_ints(lengths):
        return f"the shape of {name_of(node)} is not known"
    return [Way(list(zip(parts, index.split(lengths, d), strict=True)))]


def _stack(node: fx.Node, index: Tensor) -> list[Way] | str:
    parts: Any = node.args[0]
    d = argument(node, 1) % index.ndim
    indices = index.unbind(d) if index.shape[d] > 1 else [index.squeeze(d)] * len(parts)
    return [Way(list(zip(parts, indices, strict=True)))]


RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
                     aten.unflatten.int), _reshape),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeezed),
    aten.permute.default: _moved(_back), aten.transpose.int: _moved(_swap), aten.t.default: _moved(_swap),
    aten.unsqueeze.default: _moved(_unsqueezed),
    aten.expand.default: _expand, aten.repeat.default: _repeat, aten.repeat_interleave.self_int: _repeat_interleave,
    aten.slice.Tensor: part_of, aten.select.int: part_of, aten.narrow.default: part_of, operator.getitem: part_of,
    aten.cat.default: _cat, aten.stack.default: _stack,
    **dict.fromkeys(overloads("clone", "contiguous", "alias", "detach", "lift_fresh_copy"), same),
}  # fmt: skip
