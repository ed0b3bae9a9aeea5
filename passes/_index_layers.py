"""How a scale of channels reads further up: products, attention, and what has a weight: layers, norms, tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.oppattern import argument, pattern_of
from inc_graph.passes._index import (
    NoWeight,
    Rule,
    Tie,
    Way,
    dims_of,
    fitted,
    joined,
    name_of,
    only,
)

__all__ = ["RULES"]

aten = torch.ops.aten


def _matmul(node: fx.Node, index: Tensor) -> list[Way] | str:
    a, b = node.args[:2]
    if min(len(dims_of(a)), len(dims_of(b))) < 2:  # type: ignore[arg-type]
        return f"{name_of(node)} has a factor that is a vector"
    found: list[Way | str] = []
    if index.shape[-2] == 1:
        found.append(fitted(index, b, dims_of(node)))  # type: ignore[arg-type]
    if index.shape[-1] == 1:
        found.append(fitted(index, a, dims_of(node)))  # type: ignore[arg-type]
    return [w for w in found if isinstance(w, Way)] or f"{name_of(node)}: its rows and columns are both scaled"


def _einsum(node: fx.Node, index: Tensor) -> list[Way] | str:
    """Any of the operands takes the scale; where one is read once for each index of a dimension, these are ties."""
    operands: Any = node.args[1]
    letters = _letters(str(node.args[0]), [len(dims_of(x)) for x in operands])
    if letters is None:
        return f"{name_of(node)} {node.args[0]!r} is not understood"
    *inputs, output = letters
    whole = dict(zip(output, dims_of(node), strict=True))
    found: list[Way | str] = []
    for operand, names in zip(operands, inputs, strict=True):
        if operands.count(operand) > 1:
            continue
        ties: list[Tie] = []
        own = index
        for d, name in enumerate(output):
            if name not in names and own.shape[d] > 1:
                ties.append((own.narrow(d, 0, 1).expand_as(own), own))
                own = own.narrow(d, 0, 1)
        order = sorted(range(index.ndim), key=lambda d: [*names, output[d]].index(output[d]))
        sizes = [own.shape[output.index(name)] if name in output else 1 for name in names]
        way = fitted(own.permute(order).reshape(sizes), operand, [whole.get(name) for name in names])
        found.append(way if isinstance(way, str) else Way(way.inputs, ties + way.ties))
    good = [w for w in found if isinstance(w, Way)]
    good.sort(key=lambda w: (len(w.ties), w.inputs[0][0].op != "get_attr"))
    return good or next((w for w in found if isinstance(w, str)), f"{name_of(node)} multiplies a value by itself")


def _letters(equation: str, ranks: list[int]) -> list[list[str]] | None:
    """The names of the dimensions of each operand, then of the result. None where one has a name twice."""
    given, arrow, output = equation.replace(" ", "").partition("->")
    names = given.split(",")
    if len(names) != len(ranks):
        return None
    if not arrow:  # those that occur once, in the order of the alphabet
        output = "..." * ("..." in given) + "".join(sorted(c for c in set(given) - set(".,") if given.count(c) == 1))
    extra = max((n - len(x.replace("...", "")) for x, n in zip(names, ranks, strict=True) if "..." in x), default=0)
    found = []
    for text, rank in zip([*names, output], [*ranks, None], strict=True):
        own = extra if rank is None else rank - len(text.replace("...", ""))
        before, dots, after = text.partition("...")
        found.append([*before, *(f"{extra - own + i}" for i in range(own if dots else 0)), *after])
    return found if all(len(set(x)) == len(x) for x in found) else None


def _attention(node: fx.Node, index: Tensor) -> list[Way] | str:
    value: Any = node.args[2]
    heads, own = dims_of(node)[-3:-2], dims_of(value)[-3:-2]
    if index.shape[-2] != 1:
        return f"{name_of(node)}: its rows are scaled"
    if argument(node, 7) and heads != own and index.ndim > 2 and index.shape[-3] > 1:  # grouped heads
        parts = index.unflatten(-3, (own[0], -1)).movedim(-3, 0)
        return [Way([(value, parts[0])], [(parts[0].expand_as(parts), parts)])]
    return joined([fitted(index, value, dims_of(node))])


def _layer(node: fx.Node, index: Tensor) -> list[Way] | str:
    """A layer's rows: those of its weight and bias."""
    pattern = pattern_of(node)
    assert pattern is not None and pattern.weight is not None
    weight, bias = argument(node, pattern.weight), argument(node, pattern.bias or 0)
    channel = index.ndim - 1 if pattern.name == "linear" else 1
    if pattern.name != "linear" and (index.ndim != len(dims_of(weight)) or pattern.check(node)):
        return f"{name_of(node)} is not batched, or transposed in groups"
    if not only(index, channel):
        return f"{name_of(node)}: more than its channels are scaled"
    axis = pattern.axis(node)
    each = index.flatten().expand(dims_of(weight)[axis])
    found = [(weight, each.view([-1 if d == axis else 1 for d in range(len(dims_of(weight)))]))]
    return [Way(found + ([(bias, each)] if isinstance(bias, fx.Node) else []))]


def _norm(weight_at: int, bias_at: int | None, last: bool) -> Rule:
    """Of a norm: over its last dimensions, or each channel (dimension 1) with a weight of its own."""

    def rule(node: fx.Node, index: Tensor) -> list[Way] | str:
        weight, bias = argument(node, weight_at), argument(node, bias_at) if bias_at is not None else None
        if not isinstance(weight, fx.Node):
            return NoWeight(f"the norm {name_of(node)} has no weight that could take the scale")
        rank = len(dims_of(weight))
        dims = range(index.ndim - rank, index.ndim) if last else (1,)
        if not only(index, *dims):
            return f"{name_of(node)}: more than its channels are scaled"
        each = index.reshape([index.shape[d] for d in dims])
        return [Way([(p, each) for p in (weight, bias) if isinstance(p, fx.Node)])]

    return rule


def _embedding(node: fx.Node, index: Tensor) -> list[Way] | str:
    table: Any = node.args[0]
    return [Way([(table, index.flatten()[None])])] if only(index, -1) else f"{name_of(node)}: its rows are scaled"


RULES: dict[Any, Rule] = {
    aten.matmul.default: _matmul, aten.bmm.default: _matmul, aten.mm.default: _matmul, aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((aten.linear.default, *(getattr(getattr(aten, f"conv{d}d"), o) for d in (1, 2, 3)
                                            for o in ("default", "padding")),
                     aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _layer),
    aten.layer_norm.default: _norm(2, 3, last=True),
    **({aten.rms_norm.default: _norm(2, None, last=True)} if hasattr(aten, "rms_norm") else {}),
    aten.group_norm.default: _norm(2, 3, last=False), aten.instance_norm.default: _norm(1, 2, last=False),
    aten.batch_norm.default: _norm(1, 2, last=False),
    aten._native_batch_norm_legit_no_training.default: _norm(1, 2, last=False),
    aten.embedding.default: _embedding,
}  # fmt: skip
