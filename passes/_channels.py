"""How a scale of the channels of a value reads further up: what each operator's inputs have to be scaled by.

A scale of a value is written as an index: int64, with the value's rank. Each entry names the channel whose scale
divides that element; a dimension on which it does not depend has size 1; -1 marks elements that nobody has asked for.
So views and permutations of the value are views and permutations of its index.

`ways(node, index)` says for the operators that commute with such a scale which inputs, scaled how, give the scaled
result. f(x / s) = f(x) / s holds for

    moves (view, permute, slice, cat, expand), casts, sums over other dimensions, pooling, relu and what else is
    positively homogeneous, products (either factor), sums (all addends), attention (of its values),
    linear and convolution (of the weight's rows and the bias), norms with a weight (weight and bias), lookups (table)

and not for gelu, silu, softmax or a norm without a weight. Where one input element is read in several places (heads
that are repeated), the scales of these have to be equal: those are the ties.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.graph import is_float, shape
from inc_graph.oppattern import argument, pattern_of

__all__ = ["NoWeight", "Tie", "Way", "readers", "ways"]

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


def ways(node: fx.Node, index: Tensor) -> list[Way] | str:
    """The ways to get the result of `node` scaled by `index`, or why there is none."""
    if node.target is operator.getitem:
        return _part(node, index)
    if (rule := _RULES.get(node.target)) is not None:
        return rule(node, index)
    return f"{_name(node)} does not commute with a scale of its channels"


def readers(value: fx.Node) -> Iterator[tuple[fx.Node, Tensor | None]]:
    """(reader, the positions that it reads if these are a part of the value) of each user, in the order of the graph.

    Positions are a bool tensor that broadcasts against the value. What splits a value stands for its parts.
    """
    for user in value.users:
        if user.target in _SPLITS:
            for part in user.users:
                yield part, _positions(value, part)
        else:
            yield user, _positions(value, user)


def _name(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.name} of the model"
    schema = getattr(node.target, "_schema", None)
    return f"{node.name} ({'' if schema is None else schema.name.removeprefix('aten::')})"


def _ints(sizes: Sequence[Any]) -> bool:
    return all(isinstance(n, int) for n in sizes)


def _dims(node: fx.Node) -> list[Any]:
    return list(shape(node) or ())


def _only(index: Tensor, *dims: int) -> bool:
    """Whether the scale depends on none but these dimensions."""
    rank = index.ndim
    return all(n == 1 for d, n in enumerate(index.shape) if d not in [k % rank for k in dims])


# ---------------------------------------------------------------------------------------------------- broadcasting
def _fitted(index: Tensor, value: fx.Node) -> Way | str:
    """An index of a result, for an input that is broadcast against it. A constant may be expanded instead."""
    sizes = _dims(value)
    ties: list[Tie] = []
    constant = value.op == "get_attr"
    while index.ndim > len(sizes) and (index.shape[0] == 1 or not constant):
        first = index[:1]
        ties += [(first.expand_as(index), index)] if index.shape[0] > 1 else []
        index = first[0]
    for d, n in enumerate(sizes if index.ndim == len(sizes) else ()):
        if index.shape[d] > 1 and index.shape[d] != n and not constant:
            if n != 1 or not isinstance(n, int):
                return f"the shape of {value.name} is not known"
            first = index.narrow(d, 0, 1)
            ties.append((first.expand_as(index), index))
            index = first
    return Way([(value, index)], ties)


def _joined(parts: Sequence[Way | str]) -> list[Way] | str:
    """All of the parts in one way."""
    found = Way([])
    for part in parts:
        if isinstance(part, str):
            return part
        found.inputs += part.inputs
        found.ties += part.ties
    return [found]


# ------------------------------------------------------------------------------------------------------- elementwise
def _same(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    return [Way([(source, index)])] if is_float(source) else f"{source.name} is not floating point"


def _clamp(node: fx.Node, index: Tensor) -> list[Way] | str:
    low, high = argument(node, 1), argument(node, 2)
    if (low, high) not in ((0, None), (0.0, None), (None, 0), (None, 0.0)):
        return f"{_name(node)} cuts off at other values than zero"
    return _same(node, index)


def _masked_fill(node: fx.Node, index: Tensor) -> list[Way] | str:
    return _same(node, index) if argument(node, 2) == 0 else f"{_name(node)} fills in other values than zero"


def _mul(node: fx.Node, index: Tensor) -> list[Way] | str:
    a, b = argument(node, 0), argument(node, 1)
    factors = [x for x in (a, b) if isinstance(x, fx.Node) and is_float(x)]
    if a is b:
        return f"{_name(node)} is a square"
    factors.sort(key=lambda x: x.op != "get_attr")  # a constant takes it for nothing
    found = [_fitted(index, x) for x in factors]
    good = [w for w in found if isinstance(w, Way)]
    return good or next((w for w in found if isinstance(w, str)), f"{_name(node)} has no float factor")


def _div(node: fx.Node, index: Tensor) -> list[Way] | str:
    return _joined([_fitted(index, node.args[0])])  # type: ignore[arg-type]


def _sum(node: fx.Node, index: Tensor) -> list[Way] | str:
    terms = [argument(node, 0), argument(node, 1)]
    if not all(isinstance(x, fx.Node) for x in terms) or terms[0] is terms[1]:
        return f"{_name(node)} adds a number, or a value to itself"
    return _joined([_fitted(index, x) for x in terms])


# ------------------------------------------------------------------------------------------------------------- moves
def _reshape(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    found = _reshaped(index, _dims(source), _dims(node))
    return [Way([(source, found)])] if found is not None else f"{_name(node)} mixes channels with other dimensions"


def _reshaped(index: Tensor, inner: list[Any], outer: list[Any]) -> Tensor | None:
    """An index over sizes `outer` as one over `inner`, sizes of the same elements; None if a dimension that it depends
    on has no known size."""
    sizes: list[int] = []
    full: list[int] = []
    for a, b in _segments(inner, outer):
        parts = [index.shape[d] for d in b]
        if all(n == 1 for n in parts):
            sizes += [1] * len(a)
            full += parts
        elif _ints([inner[d] for d in a]) and _ints([outer[d] for d in b]):
            sizes += [inner[d] for d in a]
            full += [outer[d] for d in b]
        else:
            return None
    return index.expand(full).reshape(sizes)


def _segments(inner: list[Any], outer: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions that hold the same elements in both; matched from the last dimension on."""
    found: list[tuple[list[int], list[int]]] = []
    i, o = len(inner), len(outer)
    while i or o:
        if i and o and str(inner[i - 1]) == str(outer[o - 1]):
            i, o = i - 1, o - 1
            found.append(([i], [o]))
            continue
        end, a, b = (i, o), 1, 1
        while (i, o) == end or a != b:
            left = i if o == 0 or (a <= b and i) else 0
            size = inner[i - 1] if left else outer[o - 1] if o else None
            if not isinstance(size, int):
                i = o = 0  # sizes that are not known: the rest is one run
                break
            if left:
                i, a = i - 1, a * size
            else:
                o, b = o - 1, b * size
        found.append((list(range(i, end[0])), list(range(o, end[1]))))
    return found[::-1]


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
    found = _reshaped(index, _dims(source), _dims(node))
    return _reshape(node, index) if found is not None else f"{_name(node)} drops a dimension of unknown size"


def _unsqueezed(node: fx.Node, index: Tensor) -> Tensor:
    return index.squeeze(node.args[1] % index.ndim)  # type: ignore[operator]


def _expand(node: fx.Node, index: Tensor) -> list[Way] | str:
    return _joined([_fitted(index, node.args[0])])  # type: ignore[arg-type]


def _repeat_interleave(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    times, d = argument(node, 1), argument(node, 2)
    if d is None or not isinstance(times, int):
        return f"{_name(node)} repeats all elements"
    if index.shape[d] == 1:
        return [Way([(source, index)])]
    parts = index.unflatten(d, (-1, times)).movedim(d % index.ndim + 1, 0)
    return [Way([(source, parts[0])], [(parts[0].expand_as(parts), parts)])]


def _repeat(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    sizes, times = _dims(source), list(node.args[1])  # type: ignore[call-overload]
    if len(times) != len(sizes):
        return f"{_name(node)} adds dimensions"
    ties: list[Tie] = []
    for d, (n, k) in enumerate(zip(sizes, times, strict=True)):
        if index.shape[d] > 1 and k != 1:
            if not isinstance(n, int) or not isinstance(k, int):
                return f"the shape of {source.name} is not known"
            parts = index.unflatten(d, (k, n)).movedim(d, 0)
            ties.append((parts[0].expand_as(parts), parts))
            index = parts[0]
    return [Way([(source, index)], ties)]


# ------------------------------------------------------------------------------------------------- parts of a value
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)


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
    if node.target is operator.getitem and (split := node.args[0]).target in _SPLITS:  # type: ignore[union-attr]
        number: Any = node.args[1]
        if split.target is aten.unbind.int:  # type: ignore[union-attr]
            return argument(split, 1), number, True  # type: ignore[arg-type]
        d = argument(split, 2)  # type: ignore[arg-type]
        lengths = [v.shape[d] for v in split.meta["val"]]  # type: ignore[union-attr]
        if not _ints(lengths):
            return None
        start = sum(lengths[:number])
        return d, slice(start, start + lengths[number]), False
    return None


def _positions(value: fx.Node, reader: fx.Node) -> Tensor | None:
    cut = _cut(value, reader)
    if cut is None:
        return None
    d, which, _ = cut
    sizes = _dims(value)
    if not isinstance(sizes[d], int):
        return None
    found = torch.zeros(sizes[d], dtype=torch.bool)
    try:
        found[which] = True
    except TypeError:  # a size that is not known
        return None
    return found.view([-1 if k == d % len(sizes) else 1 for k in range(len(sizes))])


def _part(node: fx.Node, index: Tensor) -> list[Way] | str:
    """Of what reads a part: the whole value is scaled, or that part of it."""
    source: Any = node.args[0]
    if source.target in _SPLITS:
        source = source.args[0]
    cut = _cut(source, node)
    if cut is None:
        return f"{_name(node)} does not commute with a scale of its channels"
    d, which, goes = cut
    d %= len(_dims(source))
    size = _dims(source)[d]
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
    lengths = [_dims(x)[d] for x in parts]
    if not _ints(lengths):
        return f"the shape of {_name(node)} is not known"
    return [Way(list(zip(parts, index.split(lengths, d), strict=True)))]


def _stack(node: fx.Node, index: Tensor) -> list[Way] | str:
    parts: Any = node.args[0]
    d = argument(node, 1) % index.ndim
    indices = index.unbind(d) if index.shape[d] > 1 else [index.squeeze(d)] * len(parts)
    return [Way(list(zip(parts, indices, strict=True)))]


# ---------------------------------------------------------------------------------------- sums over other dimensions
def _reduce(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    rank = len(_dims(source))
    dims = argument(node, 1)
    over = sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))})
    if not argument(node, 2):
        for d in over:
            index = index.unsqueeze(d)
    return [Way([(source, index)])] if all(index.shape[d] == 1 for d in over) else f"{_name(node)} goes over channels"


def _spatial(node: fx.Node, index: Tensor) -> list[Way] | str:
    """Of what mixes places of a map, each channel for itself."""
    return _same(node, index) if _only(index, 0, 1) else f"{_name(node)} goes over channels"


def _pad(node: fx.Node, index: Tensor) -> list[Way] | str:
    widths: Any = node.args[1]
    padded = [index.ndim - 1 - i // 2 for i, n in enumerate(widths) if not isinstance(n, int) or n != 0]
    if any(index.shape[d] != 1 for d in padded) or argument(node, 3) not in (None, 0, 0.0):
        return f"{_name(node)} pads channels, or with other values than zero"
    return _same(node, index)


# --------------------------------------------------------------------------------------------------------- products
def _matmul(node: fx.Node, index: Tensor) -> list[Way] | str:
    a, b = node.args[:2]
    if min(len(_dims(a)), len(_dims(b))) < 2:  # type: ignore[arg-type]
        return f"{_name(node)} has a factor that is a vector"
    found: list[Way | str] = []
    if index.shape[-2] == 1:
        found.append(_fitted(index, b))  # type: ignore[arg-type]
    if index.shape[-1] == 1:
        found.append(_fitted(index, a))  # type: ignore[arg-type]
    return [w for w in found if isinstance(w, Way)] or f"{_name(node)}: its rows and columns are both scaled"


def _attention(node: fx.Node, index: Tensor) -> list[Way] | str:
    value: Any = node.args[2]
    heads, own = _dims(node)[-3:-2], _dims(value)[-3:-2]
    if index.shape[-2] != 1:
        return f"{_name(node)}: its rows are scaled"
    if argument(node, 7) and heads != own and index.ndim > 2 and index.shape[-3] > 1:  # grouped heads
        parts = index.unflatten(-3, (own[0], -1)).movedim(-3, 0)
        return [Way([(value, parts[0])], [(parts[0].expand_as(parts), parts)])]
    return _joined([_fitted(index, value)])


def _layer(node: fx.Node, index: Tensor) -> list[Way] | str:
    """A layer's rows: those of its weight and bias."""
    pattern = pattern_of(node)
    assert pattern is not None and pattern.weight is not None
    weight, bias = argument(node, pattern.weight), argument(node, pattern.bias or 0)
    channel = index.ndim - 1 if pattern.name == "linear" else 1
    if pattern.name != "linear" and (index.ndim != len(_dims(weight)) or pattern.check(node)):
        return f"{_name(node)} is not batched, or transposed in groups"
    if not _only(index, channel):
        return f"{_name(node)}: more than its channels are scaled"
    axis = pattern.axis(node)
    each = index.flatten().expand(_dims(weight)[axis])
    found = [(weight, each.view([-1 if d == axis else 1 for d in range(len(_dims(weight)))]))]
    return [Way(found + ([(bias, each)] if isinstance(bias, fx.Node) else []))]


def _norm(weight_at: int, bias_at: int | None, last: bool) -> Rule:
    """Of a norm: over its last dimensions, or each channel (dimension 1) with a weight of its own."""

    def rule(node: fx.Node, index: Tensor) -> list[Way] | str:
        weight, bias = argument(node, weight_at), argument(node, bias_at) if bias_at is not None else None
        if not isinstance(weight, fx.Node):
            return NoWeight(f"the norm {_name(node)} has no weight that could take the scale")
        rank = len(_dims(weight))
        dims = range(index.ndim - rank, index.ndim) if last else (1,)
        if not _only(index, *dims):
            return f"{_name(node)}: more than its channels are scaled"
        each = index.reshape([index.shape[d] for d in dims])
        return [Way([(p, each) for p in (weight, bias) if isinstance(p, fx.Node)])]

    return rule


def _embedding(node: fx.Node, index: Tensor) -> list[Way] | str:
    table: Any = node.args[0]
    return [Way([(table, index.flatten()[None])])] if _only(index, -1) else f"{_name(node)}: its rows are scaled"


def _swap(node: fx.Node, index: Tensor) -> Tensor:
    return index.transpose(*node.args[1:3]) if node.target is aten.transpose.int else index.t()  # type: ignore[arg-type]


def _overloads(*names: str) -> list[Any]:
    return [getattr(getattr(aten, name), o) for name in names for o in getattr(aten, name).overloads()]


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        _overloads("relu", "leaky_relu", "neg", "abs", "dropout", "clone", "contiguous", "alias", "detach", "_to_copy",
                   "to", "lift_fresh_copy", "prelu"), _same),
    aten.clamp.default: _clamp, aten.masked_fill.Scalar: _masked_fill,
    aten.mul.Tensor: _mul, aten.mul.Scalar: _mul, aten.div.Tensor: _div, aten.div.Scalar: _div,
    aten.add.Tensor: _sum, aten.sub.Tensor: _sum,
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
                     aten.unflatten.int), _reshape),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeezed),
    aten.permute.default: _moved(_back), aten.transpose.int: _moved(_swap), aten.t.default: _moved(_swap),
    aten.unsqueeze.default: _moved(_unsqueezed),
    aten.expand.default: _expand, aten.repeat.default: _repeat, aten.repeat_interleave.self_int: _repeat_interleave,
    aten.slice.Tensor: _part, aten.select.int: _part, aten.narrow.default: _part,
    aten.cat.default: _cat, aten.stack.default: _stack,
    aten.mean.dim: _reduce, aten.sum.dim_IntList: _reduce, aten.amax.default: _reduce, aten.amin.default: _reduce,
    **dict.fromkeys(
        _overloads(*(f"{kind}pool{d}d" for kind in ("max_", "avg_", "adaptive_avg_") for d in (1, 2, 3)),
                   *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d"))), _spatial),
    aten.pad.default: _pad,
    aten.matmul.default: _matmul, aten.bmm.default: _matmul, aten.mm.default: _matmul,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((aten.linear.default, *(getattr(getattr(aten, f"conv{d}d"), o) for d in (1, 2, 3)
                                            for o in ("default", "padding")),
                     aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _layer),
    aten.layer_norm.default: _norm(2, 3, last=True),
    **({aten.rms_norm.default: _norm(2, None, last=True)} if hasattr(aten, "rms_norm") else {}),
    aten.group_norm.default: _norm(2, 3, last=False), aten.instance_norm.default: _norm(1, 2, last=False),
    aten.batch_norm.default: _norm(1, 2, last=False),
    aten.embedding.default: _embedding,
}  # fmt: skip
