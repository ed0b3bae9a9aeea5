"""Correct each bias for the mean error that quantizing the weight makes.

    E[W_q x] - E[W x] = (W_q - W) * E[x]        so   b' = b - mean_space((W_q - W) * E[x])

The layer is linear, so the mean input gives the mean error exactly (Nagel et al. 2019, "Data-free quantization through weight
equalization and bias correction", section 4.2, with E[x] measured on calibration data). For a convolution E[x] is the mean
input map, so zero padding at the borders is counted right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.graph import erase_dead, get_attr, get_tensor, insert_get_attr, peek_meta, replace_uses, set_tensor, take_fuel
from inc_graph.numerics import dequantize, quantize
from inc_graph.input_mean import MeanObserver
from inc_graph.options import make_estimator
from inc_graph.oppattern import argument
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.spec import QSpec


@PASSES.register("correct-bias")
@dataclass(frozen=True)
class CorrectBias(Pass):
    """Use and remove the mean observers."""

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[str] = "observed"
    ensures: ClassVar[str] = "observed"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        for node in list(gm.graph.nodes):
            weight = peek_meta(node).get("weight", {})
            if "mean" in weight and take_fuel():
                _correct(gm, node, weight)
                report.matched.append(node.name)
        modules = dict(gm.named_children())
        means = [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(modules.get(n.target), MeanObserver)]
        for node in means:
            replace_uses(node, node.args[0])
            gm.graph.erase_node(node)
        if means:
            erase_dead(gm)
        return PassResult(gm, bool(means), report)


def _correct(gm: fx.GraphModule, layer: fx.Node, weight: dict[str, Any]) -> None:
    w_node, b_node = layer.args[1], argument(layer, 2)
    with torch.no_grad():
        w = get_tensor(gm, w_node).detach().float()
        spec = QSpec.from_json(weight["spec"])
        scale, zero = make_estimator(weight["algorithm"]).estimate(w, spec)
        block = spec.block(w.ndim)
        error = dequantize(quantize(w, scale, zero, block, spec.qtype), scale, zero, block, spec.qtype, torch.float32) - w
        mean = get_attr(gm, weight["mean"]).mean()
        shift = _shift(layer, error, mean)
        old = torch.zeros_like(shift) if b_node is None else get_tensor(gm, b_node).detach().float()
        new = (old - shift).to(get_tensor(gm, w_node).dtype)
    args = list(layer.args) + [None] * (3 - len(layer.args))
    args[2] = insert_get_attr(gm, layer, set_tensor(gm, f"{w_node.target}_bias_corrected", new))
    layer.args = tuple(args)
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}


def _shift(layer: fx.Node, error: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Mean error of each output channel: float32 `[out]`."""
    if mean.ndim == 1:
        return error @ mean
    args = list(layer.args)
    known = mean.shape[1:] if all(s > 1 for s in mean.shape[1:]) else None
    if known is None:  # sizes varied: a constant map, large enough that the border weighs little
        mean = mean.expand(-1, *(max(4 * k, 16) for k in error.shape[2:]))
    out = layer.target(mean[None], error, None, *args[3:])  # type: ignore[operator]
    return out.mean([0, *range(2, out.ndim)])
