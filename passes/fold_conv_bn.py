"""Fold an inference batch norm into the convolution or linear layer before it, or else into the one after it.

    bn(y) = gamma (y - mean) / sqrt(var + eps) + beta = k y + t
        with k = gamma / sqrt(var + eps), t = beta - k mean, one value a channel

    before:  y = W * x + b,   k y + t = (k W) * x + (k b + t)        k along W's output channels
    after:   y = W * (k x + t) + b   = (W k) * x + (b + sum(W t))    k, t along W's input channels, the sum over all
                                                                     but the output channels

The second holds only where no zero padding stands between k x + t and W. (Ioffe and Szegedy 2015, section 3.1; folding
as in Jacob et al. 2018, section 3.2.) New tensors are made, the user's stay; a layer and norm that are called twice
stay one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from inc_graph.graph import (
    erase_dead,
    get_tensor,
    insert_get_attr,
    mutated_attrs,
    replace_uses,
    set_tensor,
    take_fuel,
    val,
)
from inc_graph.oppattern import OpPattern, argument, pattern_of, set_arguments
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES

aten = torch.ops.aten

# target -> positions of (gamma, beta, mean, var, eps)
_NORMS: dict[Any, tuple[int, int, int, int, int]] = {
    aten._native_batch_norm_legit_no_training.default: (1, 2, 3, 4, 6),
    aten.native_batch_norm.default: (1, 2, 3, 4, 7),
    aten.batch_norm.default: (1, 2, 3, 4, 7),
    aten.cudnn_batch_norm.default: (1, 2, 3, 4, 7),
}
_REFUSED = {
    aten._native_batch_norm_legit.no_stats: "the batch norm has no running statistics",
    aten._native_batch_norm_legit_functional.default: "the batch norm is in training mode",
}
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)  # those that a norm before them may fold into


@PASSES.register("fold-conv-bn")
@dataclass(frozen=True)
class FoldConvBN(Pass):
    """Fold batch norms at inference into a neighbouring layer."""

    name: ClassVar[str] = "fold-conv-bn"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "float"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        fold = _Fold(gm)
        for norm in list(gm.graph.nodes):
            if norm.op != "call_function" or (norm.target not in _NORMS and norm.target not in _REFUSED):
                continue
            reason = _REFUSED.get(norm.target) or fold.why_not(norm)
            if reason is not None:
                report.missed.append((norm.name, reason))
            elif take_fuel():
                report.matched.append(norm.name)
                fold.fold(norm)
        if report.matched:
            erase_dead(gm)
        return PassResult(gm, bool(report.matched), report)


class _Fold:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.mutated = mutated_attrs(gm)
        self.made: dict[Any, tuple[str, str]] = {}  # what was folded -> attributes of the new weight and bias

    # ------------------------------------------------------------------------------------------------------- check
    def why_not(self, norm: fx.Node) -> str | None:
        if norm.target is not aten._native_batch_norm_legit_no_training.default and argument(norm, 5):
            return "the batch norm is in training mode"
        if any(argument(norm, i) is None for i in _NORMS[norm.target][2:4]):
            return "the batch norm has no running statistics"
        if not all(self.constant(argument(norm, i)) for i in _NORMS[norm.target][:4]):
            return "a statistic of the batch norm is not a constant"
        if _result(norm) is None:
            return "its saved statistics are used"
        reason = self.not_before(norm)
        if reason is not None and (after := self.not_after(norm)) is None:
            return None
        return reason if reason is None else f"{reason}; {after}"

    def constant(self, node: Any) -> bool:
        return node is None or (isinstance(node, fx.Node) and node.op == "get_attr" and node.target not in self.mutated)

    def not_before(self, norm: fx.Node) -> str | None:
        """Why the layer before the norm cannot take it, None if it can."""
        layer: Any = norm.args[0]
        if (pattern := _layer_pattern(layer)) is None:
            return "its input is not a convolution or linear layer"
        if len(layer.users) != 1:
            return f"{layer.name} has other users"
        if pattern.name == "linear":
            if val(layer).ndim != 2:
                return "the channels of a linear layer are its last dimension, the batch norm's are dimension 1"
        elif val(layer).ndim != val(layer.args[pattern.weight]).ndim:
            return "the layer's input has no batch dimension"
        if not self.constant(argument(layer, pattern.weight)) or not self.constant(argument(layer, pattern.bias)):
            return "the layer's weight or bias is not a constant"
        return None

    def not_after(self, norm: fx.Node) -> str | None:
        """Why the layer after the norm cannot take it, None if it can."""
        result: Any = _result(norm)
        (layer, *others) = result.users or [result]
        if others or (pattern := _layer_pattern(layer)) is None or argument(layer, 0) is not result:
            return "no convolution or linear layer is the only user of its output"
        if pattern.name == "linear":
            if val(result).ndim != 2:
                return "the linear layer after it has its channels in the last dimension"
        elif layer.target not in _CONVS:
            return f"{layer.name} after it may pad with zeros"
        elif val(layer).ndim != val(layer.args[pattern.weight]).ndim:
            return f"the input of {layer.name} after it has no batch dimension"
        elif _pads(argument(layer, 4)):
            return f"{layer.name} after it pads with zeros"
        if not self.constant(argument(layer, pattern.weight)) or not self.constant(argument(layer, pattern.bias)):
            return f"the weight or bias of {layer.name} after it is not a constant"
        return None

    # ----------------------------------------------------------------------------------------------------- rewrite
    def fold(self, norm: fx.Node) -> None:
        result: Any = _result(norm)
        before = self.not_before(norm) is None
        layer: Any = norm.args[0] if before else next(iter(result.users))
        pattern: Any = _layer_pattern(layer)
        w_node, b_node = argument(layer, pattern.weight), argument(layer, pattern.bias)
        constants = [b_node, *(argument(norm, i) for i in _NORMS[norm.target][:4])]
        eps, groups = argument(norm, _NORMS[norm.target][4]), _groups(layer, pattern)
        key = (before, groups, eps, layer.target, w_node.target, *(c and c.target for c in constants))
        if key not in self.made:
            weight = get_tensor(self.gm, w_node).detach()
            bias, gamma, beta, mean, var = (c and get_tensor(self.gm, c).detach().double() for c in constants)
            with torch.no_grad():
                k = (1.0 if gamma is None else gamma) / (var + eps).sqrt()
                t = (0.0 if beta is None else beta) - k * mean
                form = _before if before else _after
                new = form(weight.double(), 0.0 if bias is None else bias, k, t, groups, pattern.axis(layer))
            hint = f"{w_node.target}_folded"
            names = [
                set_tensor(self.gm, hint + end, x.to(weight.dtype)) for end, x in zip(("", "_bias"), new, strict=True)
            ]
            self.made[key] = (names[0], names[1])
        new_w, new_b = (insert_get_attr(self.gm, layer, name) for name in self.made[key])
        set_arguments(layer, {pattern.weight: new_w, pattern.bias: new_b})
        replace_uses(result, norm.args[0])  # type: ignore[arg-type]
        for node in [*norm.users, norm]:  # at once: another norm may follow, and the layer has one user again
            self.gm.graph.erase_node(node)


def _before(w: Tensor, b: Any, k: Tensor, t: Tensor, groups: int, axis: int) -> tuple[Tensor, Tensor]:
    if axis == 0:
        return w * k.view(-1, *[1] * (w.ndim - 1)), k * b + t
    grouped = w.unflatten(0, (groups, -1))  # transposed: [groups, in / groups, out / groups, *kernel]
    return (grouped * k.view(groups, 1, -1, *[1] * (w.ndim - 2))).flatten(0, 1), k * b + t


def _after(w: Tensor, b: Any, k: Tensor, t: Tensor, groups: int, axis: int) -> tuple[Tensor, Tensor]:
    grouped = w.unflatten(0, (groups, -1))  # [groups, out / groups, in / groups, *kernel]
    k, t = (v.view(groups, 1, -1, *[1] * (w.ndim - 2)) for v in (k, t))
    return (grouped * k).flatten(0, 1), (grouped * t).flatten(2).sum(2).flatten() + b


def _layer_pattern(node: Any) -> Any:
    pattern = pattern_of(node) if isinstance(node, fx.Node) else None
    if pattern is None or pattern.role != "anchor" or pattern.weight is None or pattern.bias is None:
        return None
    return pattern


def _groups(layer: fx.Node, pattern: OpPattern) -> int:
    return int(argument(layer, 6)) if pattern.name.startswith("conv") else 1


def _pads(padding: Any) -> bool:
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def _result(norm: fx.Node) -> fx.Node | None:
    """The node that holds the normalized value; None if another output of the norm is used."""
    if norm.target is aten.batch_norm.default:
        return norm
    outputs = {u: u.args[1] for u in norm.users if u.target is operator.getitem}
    values = [u for u, i in outputs.items() if i == 0]
    alone = len(outputs) == len(norm.users) and not any(i != 0 and u.users for u, i in outputs.items())
    return values[0] if alone and len(values) == 1 else None
