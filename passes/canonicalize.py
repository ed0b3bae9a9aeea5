"""Remove what means nothing at inference, and write products with constant matrices as linear layers.

    dropout(x, p, train=False) = x            clone(x) = alias(x) = x         x.to(same dtype) = x
    addmm(b, x, W) = linear(x, W^T, b)        mm(x, W) = matmul(x, W) = linear(x, W^T)          (W constant, 2-D)
    conv(pad(x, 0 around), padding=p) = conv(x, padding=p + pad)                                (same on both sides)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.graph import (
    dtype,
    erase_dead,
    get_tensor,
    insert_call,
    insert_get_attr,
    mutated_attrs,
    replace_uses,
    set_tensor,
    shape,
    take_fuel,
    val,
)
from inc_graph.oppattern import argument
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES

aten = torch.ops.aten

_CLONES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
_CASTS = (aten._to_copy.default, aten.to.dtype)
_PRODUCTS = {aten.addmm.default: (1, 2, 0), aten.mm.default: (0, 1, None), aten.matmul.default: (0, 1, None)}
_CONVS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}


@PASSES.register("canonicalize")
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop identities, fold symmetric zero padding into convolutions, make constant products linear layers."""

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "float"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        mutated = mutated_attrs(gm)
        transposed: dict[str, str] = {}
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            if _is_identity(node, mutated) and take_fuel():
                replace_uses(node, node.args[0])
                report.matched.append(node.name)
            elif node.target in _PRODUCTS and (why := _product(gm, node, mutated, transposed)) is None:
                report.matched.append(node.name)
            elif node.target in _PRODUCTS:
                report.missed.append((node.name, why or ""))
            elif node.target in _CONVS and _fold_pad(node, _CONVS[node.target]):
                report.matched.append(node.name)
        if report.matched:
            erase_dead(gm)
        return PassResult(gm, bool(report.matched), report)


def _is_identity(node: fx.Node, mutated: set[str]) -> bool:
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or any(u.op == "output" for u in node.users):
        return False  # an output that aliased an input or a parameter would be a new meaning
    if source.op == "get_attr" and source.target in mutated:
        return False  # the copy holds the value from before the write
    if node.target is aten.dropout.default:
        return argument(node, 2) is False or argument(node, 1) == 0
    if node.target in _CLONES:
        return True
    if node.target in _CASTS:
        a, b = val(source), val(node)
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and (a.dtype, a.device, a.layout) == (b.dtype, b.device, b.layout)
        )
    return False


def _product(gm: fx.GraphModule, node: fx.Node, mutated: set[str], transposed: dict[str, str]) -> str | None:
    """Rewrite a product with a constant matrix as a linear layer; the reason why not, or None."""
    x_at, w_at, b_at = _PRODUCTS[node.target]
    x, w = node.args[x_at], node.args[w_at]
    if not isinstance(w, fx.Node) or w.op != "get_attr" or not isinstance(x, fx.Node):
        return "both factors are activations"
    if w.target in mutated:
        return "the matrix is a buffer that the model writes to"
    if len(shape(w) or ()) != 2 or len(shape(x) or ()) < 2 or not (val(w).is_floating_point()):
        return "the constant factor is not a float matrix"
    bias = None if b_at is None else node.args[b_at]
    if bias is not None:
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return "addmm with alpha or beta"
        if not isinstance(bias, fx.Node) or len(shape(bias) or ()) != 1 or dtype(bias) != dtype(w):
            return "the addend is not a bias vector"
    if not take_fuel():
        return "out of fuel"
    if w.target not in transposed:
        transposed[w.target] = set_tensor(gm, f"{w.target}_t", get_tensor(gm, w).detach().t().contiguous())
    weight = insert_get_attr(gm, node, transposed[w.target])
    new = insert_call(gm, aten.linear.default, (x, weight, bias), before=node, like=node)
    replace_uses(node, new)
    return None


def _fold_pad(node: fx.Node, dims: int) -> bool:
    pad = node.args[0]
    if not isinstance(pad, fx.Node) or pad.target is not aten.pad.default:
        return False
    widths = list(pad.args[1])  # type: ignore[arg-type]
    if argument(pad, 2) != "constant" or argument(pad, 3) not in (None, 0, 0.0):
        return False
    widths += [0] * (2 * dims - len(widths))
    pairs = [(widths[2 * i], widths[2 * i + 1]) for i in range(dims)][::-1]  # pad counts from the last dimension
    if len(widths) != 2 * dims or any(not isinstance(a, int) or a != b or a < 0 for a, b in pairs) or not take_fuel():
        return False
    args = list(node.args) + [argument(node, i) for i in range(len(node.args), 7)]
    old = args[4] if isinstance(args[4], list | tuple) else [args[4]] * dims
    old = list(old) * dims if len(old) == 1 else list(old)
    args[0], args[4] = pad.args[0], [p + a for p, (a, _) in zip(old, pairs, strict=True)]
    node.args, node.kwargs = tuple(args), {}
    return True
