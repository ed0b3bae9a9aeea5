"""A graph that was captured in training, spelled as inference, with notes of what training does otherwise.

    dropout(x)                 -> x, and on its readers   dropout {x: [which, p]}
    attention(..., p)          -> attention(..., 0), and  dropout_p
    batch norm of the batch    -> batch norm of running statistics, and  norm: {its tensors and numbers};
                                  behind a layer that can take it in, only the note on that layer
    detach(x)                  -> x, and on its readers   detached: [which of their arguments]

So annotation sees what will run after conversion; `insert-fake-quant` puts the rest back. Tensors that nobody reads any
more stay in the module for it. What is random, or depends on the batch, and is not known here is an error: it would
stay so in inference.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from inc_graph.errors import ConfigError
from inc_graph.graph import inc_meta, insert_call, module_path, replace_uses
from inc_graph.oppattern import argument, set_arguments
from inc_graph.passes.fold_conv_bn import _Fold as Fold
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES

aten = torch.ops.aten

_LEARNING = aten._native_batch_norm_legit_functional.default
_FIXED = aten._native_batch_norm_legit_no_training.default
_ATTENTION = aten.scaled_dot_product_attention.default
_DROPOUTS = (aten.native_dropout.default, aten.dropout.default)


@PASSES.register("inference-form")
@dataclass(frozen=True)
class InferenceForm(Pass):
    """Spell training as inference, and note the difference."""

    name: ClassVar[str] = "inference-form"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "float"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in (_LEARNING, _FIXED):
                _norm(gm, node, report)
            elif node.target in _DROPOUTS:
                _dropout(gm, node)
                report.matched.append(node.name)
            elif node.target is _ATTENTION and argument(node, 4):
                inc_meta(node)["dropout_p"] = float(argument(node, 4))
                set_arguments(node, {4: 0.0})
                report.matched.append(node.name)
        for node in gm.graph.find_nodes(op="call_function", target=aten.detach.default):
            _detach(node, report)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        for node in gm.graph.nodes:
            if node.op == "call_function" and (why := _training_only(node)) is not None:
                hint = "leave out the example inputs: layer by layer this part of the model stays as it is"
                raise ConfigError(f"{node.target} {why}", node=node, module=module_path(node), hint=hint)
        return PassResult(gm, bool(report.matched), report)


def _training_only(node: fx.Node) -> str | None:
    """Why an operator would not be the same in inference, None if it is."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags and node.target is not _ATTENTION:
        return "is random, and how it behaves in evaluation is not known"
    if target in (_LEARNING, aten._native_batch_norm_legit.default):
        return "normalizes by the batch in a form that is not known"
    names = {a.name: argument(node, i) for i, a in enumerate(target._schema.arguments)}
    return "was captured in training mode" if names.get("train") is True or names.get("training") is True else None


def _detach(node: fx.Node, report: PassReport) -> None:
    """Buffers take no history in inference either."""
    for reader in [u for u in node.users if u.target is not aten.copy_.default]:
        leaves, tree = pytree.tree_flatten((reader.args, reader.kwargs))
        at = [i for i, leaf in enumerate(leaves) if leaf is node]
        notes = inc_meta(reader)
        notes["detached"] = sorted({*notes.get("detached", []), *at})
        leaves = [node.args[0] if leaf is node else leaf for leaf in leaves]
        reader.args, reader.kwargs = pytree.tree_unflatten(leaves, tree)
        report.matched.append(node.name)


# ------------------------------------------------------------------------------------------------------------ dropout
def _dropout(gm: fx.GraphModule, node: fx.Node) -> None:
    source, p, trains = node.args[0], node.args[1], argument(node, 2)
    results = [node]
    if node.target is aten.native_dropout.default:
        results = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
        if any(u not in results and u.users for u in node.users):
            raise ConfigError("the mask of this dropout is read", node=node, module=module_path(node))
    for result in results:
        for reader in list(result.users):
            notes = inc_meta(reader).setdefault("dropout", {})
            earlier = notes.pop(result.name, [])
            known = inc_meta(node).get("dropout", {}).get(source.name, [])  # type: ignore[union-attr]
            if trains is not False and p:
                notes[source.name] = [*known, [node.name, float(p)], *earlier]  # type: ignore[union-attr, arg-type]
        replace_uses(result, source)  # type: ignore[arg-type]
    for dead in [*node.users, node]:
        gm.graph.erase_node(dead)


# --------------------------------------------------------------------------------------------------------- batch norms
def _norm(gm: fx.GraphModule, node: fx.Node, report: PassReport) -> None:
    learns = node.target is _LEARNING
    x, *rest = node.args[:5]
    reads = [_read(r) for r in rest]
    if any(r is None for r in reads[2:]) or any(r is not None and r.op != "get_attr" for r in reads):
        report.missed.append((node.name, "its statistics are not buffers"))
        return
    momentum, eps = (argument(node, 6), argument(node, 7)) if learns else (argument(node, 5), argument(node, 6))
    notes: dict[str, Any] = {"momentum": float(momentum), "eps": float(eps), "frozen": not learns, "count": None}
    notes |= {n: r and str(r.target) for n, r in zip(("gamma", "beta", "mean", "var"), reads, strict=True)}
    if learns:
        node = _as_inference(gm, node, x, reads, notes)
    report.matched.append(node.name)
    if (why := Fold(gm).not_before(node)) is not None:
        inc_meta(_result(node))["norm"] = notes
        report.missed.append((node.name, f"not folded: {why}"))
        return
    layer: Any = node.args[0]
    inc_meta(layer)["norm"] = notes
    for user in list(node.users):
        replace_uses(user, layer)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _as_inference(
    gm: fx.GraphModule, node: fx.Node, x: Any, reads: list[fx.Node | None], notes: dict[str, Any]
) -> fx.Node:
    """The same norm with running statistics; what wrote these goes."""
    name = f"{notes['mean'].rpartition('.')[0]}.num_batches_tracked"
    writes = gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    counts = [n for n in writes if n.args[0].op == "get_attr" and n.args[0].target == name]
    notes["count"] = name if counts else None
    new = insert_call(gm, _FIXED, (x, *reads, notes["momentum"], notes["eps"]), before=node, like=node)
    result = insert_call(gm, operator.getitem, (new, 0), before=node, like=node, name="batch_norm")
    for user in list(node.users):
        if user.args[1] == 0:
            replace_uses(user, result)
    mine = [n for n in writes if n.args[0] in reads[2:] and _written(n) in node.users]
    for dead in [*mine, *counts]:
        value: Any = dead.args[1]
        gm.graph.erase_node(dead)
        if value.target is aten.detach.default and not value.users:
            gm.graph.erase_node(value)
    for user in list(node.users):
        if user.users:
            raise ConfigError("the statistics of this batch norm are read", node=node, module=module_path(node))
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return new


def _result(node: fx.Node) -> fx.Node:
    return next(u for u in node.users if u.args[1] == 0)


def _written(copy: fx.Node) -> Any:
    """The value that a buffer takes."""
    value: Any = copy.args[1]
    return value.args[0] if value.target is aten.detach.default else value


def _read(node: Any) -> fx.Node | None:
    """The attribute read behind a copy of it."""
    while isinstance(node, fx.Node) and node.target is aten.clone.default:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None
