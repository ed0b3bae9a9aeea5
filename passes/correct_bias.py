"""Correct each bias for the mean error that quantizing the weight makes.

    E[W_q x] - E[W x] = (W_q - W) * E[x]        so   b' = b - mean_space((W_q - W) * E[x])

The layer is linear, so the mean input gives the mean error exactly (Nagel et al. 2019, "Data-free quantization through
weight equalization and bias correction", section 4.2, with E[x] measured on calibration data). For a convolution E[x]
is the mean input map, so zero padding at the borders is counted right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from inc_graph.graph import (
    erase_dead,
    get_attr,
    get_tensor,
    insert_get_attr,
    peek_meta,
    replace_uses,
    set_tensor,
    take_fuel,
)
from inc_graph.input_mean import MeanObserver
from inc_graph.oppattern import OpPattern, argument, pattern_of, set_arguments
from inc_graph.passes._codes import codes_of_weight
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES


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
            if "mean" not in peek_meta(node).get("weight", {}):
                continue
            pattern: Any = pattern_of(node)
            bias: Any = argument(node, pattern.bias)
            if bias is not None and bias.op != "get_attr":
                report.missed.append((node.name, "its bias is computed at run time"))
            elif take_fuel():
                _correct(gm, node, pattern)
                report.matched.append(node.name)
        means = [
            n for n in gm.graph.nodes if n.op == "call_module" and isinstance(get_attr(gm, n.target), MeanObserver)
        ]
        for node in means:
            replace_uses(node, node.args[0])
            gm.graph.erase_node(node)
        if means:
            erase_dead(gm)
        return PassResult(gm, bool(means), report)


def _correct(gm: fx.GraphModule, layer: fx.Node, pattern: OpPattern) -> None:
    w_node, b_node = argument(layer, pattern.weight), argument(layer, pattern.bias)  # type: ignore[arg-type]
    annotation = peek_meta(layer)["weight"]
    observer: MeanObserver = get_attr(gm, annotation["mean"])
    with torch.no_grad():
        weight = get_tensor(gm, w_node).detach()
        error = codes_of_weight(weight, annotation).values() - weight.float()
        shift = _shift(layer, error, observer)
        old = 0.0 if b_node is None else get_tensor(gm, b_node).detach().float()
        new = (old - shift).to(weight.dtype)
    name = set_tensor(gm, f"{w_node.target}_bias_corrected", new)
    set_arguments(layer, {pattern.bias: insert_get_attr(gm, layer, name)})  # type: ignore[dict-item]


def _shift(layer: fx.Node, error: Tensor, observer: MeanObserver) -> Tensor:
    """Mean error of each output channel: float32 `[out]`."""
    mean = observer.mean()
    if observer.kind == "channels":
        return error @ mean
    if observer.varied:  # a constant map, large enough that the border weighs little
        mean = mean.expand(-1, *(max(4 * k, 16) for k in error.shape[2:]))
    out = layer.target(mean[None], error, None, *layer.args[3:])  # type: ignore[operator]
    return out.mean([0, *range(2, out.ndim)])
