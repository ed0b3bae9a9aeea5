"""How a scale of channels reads further up: operators on elements, sums over other dimensions, and pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.graph import is_float
from inc_graph.oppattern import argument
from inc_graph.passes._index import (
    Rule,
    Way,
    dims_of,
    fitted,
    joined,
    name_of,
    only,
    overloads,
    same,
)

__all__ = ["RULES"]

aten = torch.ops.aten


def _clamp(node: fx.Node, index: Tensor) -> list[Way] | str:
    low, high = argument(node, 1), argument(node, 2)
    if (low, high) not in ((0, None), (0.0, None), (None, 0), (None, 0.0)):
        return f"{name_of(node)} cuts off at other values than zero"
    return same(node, index)


def _masked_fill(node: fx.Node, index: Tensor) -> list[Way] | str:
    return same(node, index) if argument(node, 2) == 0 else f"{name_of(node)} fills in other values than zero"


def _mul(node: fx.Node, index: Tensor) -> list[Way] | str:
    a, b = argument(node, 0), argument(node, 1)
    factors = [x for x in (a, b) if isinstance(x, fx.Node) and is_float(x)]
    if a is b:
        return f"{name_of(node)} is a square"
    factors.sort(key=lambda x: x.op != "get_attr")  # a constant takes it for nothing
    found = [fitted(index, x, dims_of(node)) for x in factors]
    good = [w for w in found if isinstance(w, Way)]
    return good or next((w for w in found if isinstance(w, str)), f"{name_of(node)} has no float factor")


def _div(node: fx.Node, index: Tensor) -> list[Way] | str:
    return joined([fitted(index, node.args[0], dims_of(node))])  # type: ignore[arg-type]


def _sum(node: fx.Node, index: Tensor) -> list[Way] | str:
    terms = [argument(node, 0), argument(node, 1)]
    if not all(isinstance(x, fx.Node) for x in terms) or terms[0] is terms[1]:
        return f"{name_of(node)} adds a number, or a value to itself"
    return joined([fitted(index, x, dims_of(node)) for x in terms])


# ---------------------------------------------------------------------------------------- sums over other dimensions
def _reduce(node: fx.Node, index: Tensor) -> list[Way] | str:
    source: Any = node.args[0]
    rank = len(dims_of(source))
    dims = argument(node, 1)
    over = sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))})
    if not argument(node, 2):
        for d in over:
            index = index.unsqueeze(d)
    return [Way([(source, index)])] if all(index.shape[d] == 1 for d in over) else f"{name_of(node)} goes over channels"


def _spatial(node: fx.Node, index: Tensor) -> list[Way] | str:
    """Of what mixes places of a map, each channel for itself."""
    return same(node, index) if only(index, 0, 1) else f"{name_of(node)} goes over channels"


def _pad(node: fx.Node, index: Tensor) -> list[Way] | str:
    widths: Any = node.args[1]
    padded = [index.ndim - 1 - i // 2 for i, n in enumerate(widths) if not isinstance(n, int) or n != 0]
    if any(index.shape[d] != 1 for d in padded) or argument(node, 3) not in (None, 0, 0.0):
        return f"{name_of(node)} pads channels, or with other values than zero"
    return same(node, index)


def _gated(node: fx.Node, index: Tensor) -> list[Way] | str:
    """glu(x) = a sigmoid(b), a and b the halves of x: of these a is scaled."""
    source: Any = node.args[0]
    d = argument(node, 1) % index.ndim
    half = dims_of(node)[d]
    if not isinstance(half, int):
        return f"the shape of {name_of(node)} is not known"
    values = index.expand([half if k == d else n for k, n in enumerate(index.shape)])
    return [Way([(source, torch.cat([values, torch.full_like(values, -1)], d))])]


RULES: dict[Any, Rule] = {
    **dict.fromkeys(overloads("relu", "leaky_relu", "neg", "abs", "dropout", "_to_copy", "to", "prelu"), same),
    aten.clamp.default: _clamp, aten.masked_fill.Scalar: _masked_fill,
    aten.mul.Tensor: _mul, aten.mul.Scalar: _mul, aten.div.Tensor: _div, aten.div.Scalar: _div,
    aten.add.Tensor: _sum, aten.sub.Tensor: _sum, aten.glu.default: _gated,
    aten.mean.dim: _reduce, aten.sum.dim_IntList: _reduce, aten.amax.default: _reduce, aten.amin.default: _reduce,
    **dict.fromkeys(
        overloads(*(f"{kind}pool{d}d" for kind in ("max_", "avg_", "adaptive_avg_") for d in (1, 2, 3)),
                  *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d"))), _spatial),
    aten.pad.default: _pad,
}  # fmt: skip
