"""From the graph that was trained to one that is converted: trainable -> observed.

fake quantizer of a value      -> an observer that gives the scale of training
fake quantizer of a weight     -> gone; a learned scale is noted for `convert-qdq`, which finds any other again
k W, norm behind a layer       -> the weight k W and the bias of evaluation
other norms, dropout, detach   -> as in evaluation
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.errors import TrainingError
from inc_graph.fake_quantizer import FakeQuantizer
from inc_graph.graph import (
    erase_dead,
    get_attr,
    get_tensor,
    inc_meta,
    insert_call,
    insert_get_attr,
    peek_meta,
    replace_uses,
    set_level,
    set_module,
    set_tensor,
)
from inc_graph.learned_step import LearnedStep
from inc_graph.oppattern import argument, pattern_of, set_arguments
from inc_graph.passes.insert_fake_quant import take_over
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.trained_modules import Attention, Detach, DropoutMask, FoldedNorm, FoldedWeight, Norm
from inc_graph.trained_scales import TRAINED, TrainedObserver

aten = torch.ops.aten


@PASSES.register("keep-trained")
@dataclass(frozen=True)
class KeepTrained(Pass):
    """trainable -> observed."""

    name: ClassVar[str] = "keep-trained"
    requires: ClassVar[str] = "trainable"
    ensures: ClassVar[str] = "observed"

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        observers: dict[str, str] = {}
        for node in gm.graph.find_nodes(op="call_module"):
            if isinstance(get_attr(gm, str(node.target)), Detach):
                replace_uses(node, node.args[0])
        for node in gm.graph.find_nodes(op="call_module"):
            module = get_attr(gm, str(node.target))
            if isinstance(module, FoldedNorm):
                _unfold(gm, node, module)
            elif isinstance(module, FoldedWeight):
                pass  # with its norm
            elif isinstance(module, Norm):
                _norm(gm, node)
            elif isinstance(module, Attention):
                _attention(gm, node)
            elif isinstance(module, FakeQuantizer):
                _quantizer(gm, node, module, observers)
                report.matched.append(node.name)
            elif not isinstance(module, DropoutMask):  # which has no reader in the end
                replace_uses(node, node.args[0])
        for node in reversed(list(gm.graph.find_nodes(op="call_module"))):
            if not node.users and "observes" not in peek_meta(node):
                gm.graph.erase_node(node)
        for node in gm.graph.nodes:
            for key in ("dropout", "dropout_p", "detached", "norm", "options"):
                peek_meta(node).pop(key, None)
        erase_dead(gm)
        set_level(gm, "observed")
        return PassResult(gm, True, report)


def _quantizer(gm: fx.GraphModule, node: fx.Node, module: FakeQuantizer, observers: dict[str, str]) -> None:
    source: Any = node.args[0]
    if (observes := peek_meta(node).get("observes")) is not None:
        if module.spec.dynamic:
            replace_uses(node, source)
            inc_meta(node).pop("observes")
            return
        name = str(node.target)
        if name not in observers:
            observer = TrainedObserver(module.spec, module.params(), module.seen, observes["value"], module.path)
            observers[name] = set_module(gm, name.replace("fake_quant", "observer"), observer)
        node.target = observers[name]
        return
    (layer,) = node.users
    if isinstance(module, LearnedStep):
        scale, zero = module.params()
        zero = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero
        gm.meta.setdefault(TRAINED, {})[layer.name] = (scale.clone(), zero.clone())
    read = source if source.op == "get_attr" else source.args[0]
    if not bool(get_tensor(gm, read).isfinite().all()):
        hint = "go back to a checkpoint before that"
        raise TrainingError("the weight holds NaN or infinity", module=module.path, hint=hint)
    replace_uses(node, source)


def _unfold(gm: fx.GraphModule, node: fx.Node, module: FoldedNorm) -> None:
    """The layer gets the weight and the bias that it has in evaluation."""
    layer: Any = node.args[0]
    tensors = [a and get_tensor(gm, a) for a in node.args[1:6]]
    pattern: Any = pattern_of(layer)
    weight_node = argument(layer, pattern.weight)
    fold = weight_node if isinstance(get_attr(gm, str(weight_node.target)), FoldedWeight) else weight_node.args[0]
    read = fold.args[0]
    gamma, var = (a and get_tensor(gm, a) for a in fold.args[1:3])
    scaled = get_attr(gm, str(fold.target))(get_tensor(gm, read), gamma, var)
    shift = module.shift(*tensors).to(scaled.dtype)  # type: ignore[arg-type]
    names = [set_tensor(gm, f"{read.target}_folded{end}", t) for end, t in (("", scaled), ("_bias", shift))]
    new_w, new_b = (insert_get_attr(gm, fold, name) for name in names)
    replace_uses(fold, new_w)
    set_arguments(layer, {pattern.bias: new_b})
    replace_uses(node, layer)


def _norm(gm: fx.GraphModule, node: fx.Node) -> None:
    notes = peek_meta(node)["norm"]
    args = (*node.args[:5], notes["momentum"], notes["eps"])
    call = insert_call(gm, aten._native_batch_norm_legit_no_training.default, args, after=node, like=node)
    result = insert_call(gm, operator.getitem, (call, 0), after=call, like=node, name="batch_norm")
    replace_uses(node, result)
    take_over(gm, node, result)


def _attention(gm: fx.GraphModule, node: fx.Node) -> None:
    notes = peek_meta(node)
    options = {k: v for k, v in notes["options"].items() if k != "is_causal"}
    args = (*node.args, 0.0, notes["options"].get("is_causal", False))
    call = insert_call(gm, aten.scaled_dot_product_attention.default, args, options, after=node, like=node)
    replace_uses(node, call)
    take_over(gm, node, call)
