"""Fold an inference batch norm into the convolution or linear layer before it.

    bn(y) = gamma (y - mean) / sqrt(var + eps) + beta,   y = W * x + b
          = (k W) * x + (b - mean) k + beta              with k = gamma / sqrt(var + eps), one value an output channel

(Ioffe and Szegedy 2015, section 3.1; folding as in Jacob et al. 2018, section 3.2.) New tensors are made; the user's stay.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

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
from inc_graph.oppattern import argument, pattern_of
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES

aten = torch.ops.aten

# target -> positions of (gamma, beta, mean, var, eps)
_NORMS = {
    aten._native_batch_norm_legit_no_training.default: (1, 2, 3, 4, 6),
    aten._native_batch_norm_legit.default: (1, 2, 3, 4, 7),
    aten.native_batch_norm.default: (1, 2, 3, 4, 7),
    aten.batch_norm.default: (1, 2, 3, 4, 7),
    aten.cudnn_batch_norm.default: (1, 2, 3, 4, 7),
}


@PASSES.register("fold-conv-bn")
@dataclass(frozen=True)
class FoldConvBN(Pass):
    """Fold batch norms at inference into the layer that feeds them."""

    name: ClassVar[str] = "fold-conv-bn"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "float"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        mutated = mutated_attrs(gm)
        for norm in list(gm.graph.nodes):
            if norm.op == "call_function" and norm.target in _NORMS:
                reason = _why_not(norm, mutated)
                if reason is None and take_fuel():
                    _fold(gm, norm)
                    report.matched.append(norm.name)
                elif reason is not None:
                    report.missed.append((norm.name, reason))
        if report.matched:
            erase_dead(gm)
        return PassResult(gm, bool(report.matched), report)


def _why_not(norm: fx.Node, mutated: set[str]) -> str | None:
    layer = norm.args[0]
    if norm.target is not aten._native_batch_norm_legit_no_training.default and argument(norm, 5):
        return "the batch norm is in training mode"
    pattern = pattern_of(layer) if isinstance(layer, fx.Node) else None
    if pattern is None or pattern.role != "anchor" or pattern.weight is None or pattern.name == "embedding":
        return "its input is not a convolution or linear layer"
    if len(layer.users) != 1:
        return f"{layer.name} has other users"
    if pattern.name == "linear" and val(layer).ndim != 2:
        return "the channels of a linear layer are its last dimension, the batch norm's are dimension 1"
    if reason := pattern.check(layer):
        return reason
    constants = [layer.args[pattern.weight], argument(layer, 2), *(norm.args[i] for i in _NORMS[norm.target][:4])]
    for c in constants:
        if c is not None and (not isinstance(c, fx.Node) or c.op != "get_attr" or c.target in mutated):
            return "a weight or statistic is not a constant"
    if constants[4] is None or constants[5] is None:
        return "the batch norm has no running statistics"
    if norm.target is not aten.batch_norm.default:
        for user in norm.users:
            if user.target is not operator.getitem or (user.args[1] != 0 and user.users):
                return "its saved statistics are used"
    return None


def _fold(gm: fx.GraphModule, norm: fx.Node) -> None:
    layer: Any = norm.args[0]
    pattern = pattern_of(layer)
    assert pattern is not None and pattern.weight is not None
    axis = pattern.axis(layer)
    w_node, b_node = layer.args[pattern.weight], argument(layer, 2)
    gamma_at, beta_at, mean_at, var_at, eps_at = _NORMS[norm.target]

    def constant(node: Any, default: float) -> torch.Tensor:
        return torch.full_like(mean, default) if node is None else get_tensor(gm, node).detach().double()

    with torch.no_grad():
        mean = get_tensor(gm, norm.args[mean_at]).detach().double()  # type: ignore[arg-type]
        weight = get_tensor(gm, w_node).detach()
        k = constant(norm.args[gamma_at], 1.0) / (constant(norm.args[var_at], 1.0) + argument(norm, eps_at)).sqrt()
        along = [1] * weight.ndim
        along[axis] = -1
        new_w = (weight.double() * k.view(along)).to(weight.dtype)
        new_b = ((constant(b_node, 0.0) - mean) * k + constant(norm.args[beta_at], 0.0)).to(weight.dtype)
    hint = w_node.target.replace(".", "_")
    args = list(layer.args) + [None] * (3 - len(layer.args))
    args[pattern.weight] = insert_get_attr(gm, layer, set_tensor(gm, f"{hint}_folded", new_w))
    args[2] = insert_get_attr(gm, layer, set_tensor(gm, f"{hint}_folded_bias", new_b))
    layer.args = tuple(args)
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k not in ("weight", "bias")}
    outputs = [norm] if norm.target is aten.batch_norm.default else [u for u in norm.users if u.args[1] == 0]
    for out in outputs:
        replace_uses(out, layer)
