"""A graph that is trained: each value that will be quantized goes through a fake quantizer, and so does each weight.

    value --> reader           becomes   value --> fake quantizer --> reader          one for all that share a scale
    weight --> layer           becomes   weight --> fake quantizer --> layer
    with a folded batch norm             weight --> k W --> fake quantizer --> layer --> norm -->
    a dropout that was noted             ... --> times its mask --> reader
    a detach that was noted              ... --> detach --> reader

Parameters stay the parameters of the graph, and gradients reach them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from inc_graph.errors import PassError
from inc_graph.fake_quantizer import FakeQuantizer
from inc_graph.graph import (
    erase_dead,
    get_attr,
    get_tensor,
    inc_meta,
    insert_get_attr,
    module_path,
    peek_meta,
    replace_uses,
    set_level,
    set_module,
)
from inc_graph.oppattern import argument, pattern_of, set_arguments
from inc_graph.passes._place import behind, head, stamp
from inc_graph.passes.insert_observers import is_carried
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.spec import QSpec
from inc_graph.trained_modules import ApplyMask, Attention, Detach, DropoutMask, FoldedNorm, FoldedWeight, Norm
from inc_graph.trained_scales import quantizer_for

aten = torch.ops.aten


@dataclass
class _State:
    gm: fx.GraphModule
    first: fx.Node
    quantizers: dict[tuple[str, str], str] = field(default_factory=dict)  # (group, key) -> module name
    ends: dict[fx.Node, fx.Node] = field(default_factory=dict)  # layer -> the norm behind it
    masks: dict[str, fx.Node] = field(default_factory=dict)  # name of a dropout -> its mask
    masked: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict)


@PASSES.register("insert-fake-quant")
@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """annotated -> trainable. Options as the arguments of `prepare_qat`."""

    name: ClassVar[str] = "insert-fake-quant"
    requires: ClassVar[str] = "annotated"
    ensures: ClassVar[str] = "trainable"
    learn_scales: bool = False
    freeze_after: int | None = None
    check: bool = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        state = _State(gm, head(gm))
        nodes = list(gm.graph.nodes)
        for node in nodes:
            if "norm" in peek_meta(node):
                _norm(state, node)
            if "dropout_p" in peek_meta(node):
                _attention(state, node)
        gm.graph.eliminate_dead_code()  # what was taken over
        nodes = list(gm.graph.nodes)
        for value in nodes:
            for key, quant in peek_meta(value).get("quant", {}).items():
                if not is_carried(value, key):
                    self._value(state, value, key, quant)
                    report.matched.append(value.name)
        for layer in nodes:
            if "weight" in peek_meta(layer):
                self._weight(state, layer)
        for node in nodes:
            if "dropout" in peek_meta(node):
                _dropouts(state, node)
        _detach(state)
        erase_dead(gm)  # recompiles
        set_level(gm, "trainable")
        return PassResult(gm, True, report)

    def _quantizer(self, spec: QSpec, algorithm: str, weight: Any, path: str) -> FakeQuantizer:
        found = quantizer_for(spec, algorithm, weight, path, self.learn_scales, self.freeze_after, self.check)
        found.watch = weight is None
        return found

    def _value(self, state: _State, value: fx.Node, key: str, quant: dict[str, Any]) -> None:
        source = state.ends.get(value, value)
        readers = [u for u in source.users if peek_meta(u).get("reads", {}).get(value.name) == key]
        if not readers:
            raise PassError("annotated as quantized but read by nobody", node=value)
        spec, group = QSpec.from_json(quant["spec"]), (quant["group"], key)
        if group not in state.quantizers:
            path = module_path(readers[0]) or module_path(value) or value.name
            module = self._quantizer(spec, quant["algorithm"], None, path)
            state.quantizers[group] = set_module(state.gm, f"fake_quant_{quant['group']}", module)
        node = _call(state, state.quantizers[group], (source,), after=source, like=value)
        inc_meta(node)["observes"] = {"value": value.name, "key": key}
        replace_uses(source, node, only=readers)

    def _weight(self, state: _State, layer: fx.Node) -> None:
        pattern: Any = pattern_of(layer)
        source: Any = argument(layer, pattern.weight)
        read, weight = source, None
        if source.op == "call_module":  # scaled by the norm behind the layer
            read = source.args[0]
            tensors = [a and get_tensor(state.gm, a) for a in source.args]
            weight = state.gm.get_submodule(source.target)(*tensors)
        weight = get_tensor(state.gm, read) if weight is None else weight
        annotation, path = peek_meta(layer)["weight"], module_path(layer) or layer.name
        module = self._quantizer(QSpec.from_json(annotation["spec"]), annotation["algorithm"], weight, path)
        name = set_module(state.gm, f"fake_quant_{read.target.replace('.', '_')}", module)
        node = _call(state, name, (source,), before=layer, like=layer, value=read)
        set_arguments(layer, {pattern.weight: node})


def _call(
    state: _State, module: str, args: tuple[Any, ...], *, like: fx.Node, after: fx.Node | None = None,
    before: fx.Node | None = None, value: fx.Node | None = None,
) -> fx.Node:  # fmt: skip
    graph = state.gm.graph
    with graph.inserting_before(before) if after is None else behind(state.gm, after, state.first):
        node = graph.create_node("call_module", module, args, {})
    node.meta["val"] = (value or like).meta["val"]
    stamp(node, like)
    return node


def _attr(state: _State, name: str | None, before: fx.Node) -> fx.Node | None:
    return None if name is None else insert_get_attr(state.gm, before, name)


# ---------------------------------------------------------------------------------------------- what training does else
def _norm(state: _State, node: fx.Node) -> None:
    """A norm behind the layer that it is folded into, or in the place of the inference norm that `node` is."""
    gm, norm = state.gm, peek_meta(node)["norm"]
    pattern = pattern_of(node)
    folded = pattern is not None and pattern.weight is not None
    kind = FoldedNorm if folded else Norm
    module = kind(norm["momentum"], norm["eps"], norm["frozen"]).to(get_tensor(gm, norm["mean"]).device)
    name = set_module(gm, f"norm_{node.name}", module)
    bias = argument(node, pattern.bias) if folded else None  # type: ignore[arg-type, union-attr]
    x = node if folded else node.args[0].args[0]  # type: ignore[union-attr]
    new = _call(state, name, (x,), after=node, like=node)
    tensors = [_attr(state, norm[k], new) for k in ("gamma", "beta", "mean", "var", "count")]
    replace_uses(node, new)
    new.args = (x, bias, *tensors) if folded else (x, *tensors)
    if not folded:
        take_over(gm, node, new)
        if (detached := peek_meta(node.args[0]).get("detached")) is not None:  # type: ignore[arg-type]
            inc_meta(new)["detached"] = detached
        return
    assert pattern is not None
    weight: Any = argument(node, pattern.weight)  # type: ignore[arg-type]
    groups = int(argument(node, 6)) if pattern.name.startswith("conv") else 1
    fold = set_module(gm, f"fold_{node.name}", FoldedWeight(norm["eps"], pattern.axis(node), groups))
    args = (weight, *(_attr(state, norm[k], node) for k in ("gamma", "var")))
    scaled = _call(state, fold, args, before=node, like=node, value=weight)
    set_arguments(node, {pattern.weight: scaled, pattern.bias: None})  # type: ignore[dict-item]
    state.ends[node] = new


def take_over(gm: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    """Let `new` have what is noted on `old` and of it."""
    inc_meta(new).update({k: v for k, v in inc_meta(old).items() if k != "provenance"})
    for node in gm.graph.nodes:
        notes = peek_meta(node)
        for names in (notes.get("reads", {}), notes.get("dropout", {})):
            if old.name in names:
                names[new.name] = names.pop(old.name)
        for quant in notes.get("quant", {}).values():
            quant["group"] = new.name if quant["group"] == old.name else quant["group"]
        if notes.get("observes", {}).get("value") == old.name:
            notes["observes"]["value"] = new.name


def _dropouts(state: _State, reader: fx.Node) -> None:
    for name, drops in peek_meta(reader)["dropout"].items():
        for source in list(reader.all_input_nodes):
            origin = _origin(source)
            if origin.name != name:
                continue
            new = source
            for which, p in drops:
                if which not in state.masks:
                    module = set_module(state.gm, f"mask_{which}", DropoutMask(p))
                    end = state.ends.get(origin, origin)
                    state.masks[which] = _call(state, module, (end,), after=end, like=origin)
                if (new, which) not in state.masked:
                    module = set_module(state.gm, f"apply_{which}", ApplyMask())
                    mask = state.masks[which]
                    last = max(new, mask)
                    state.masked[new, which] = _call(state, module, (new, mask), after=last, like=origin)
                new = state.masked[new, which]
            reader.replace_input_with(source, new)


def _origin(node: fx.Node) -> fx.Node:
    """The value that fake quantizers, masks and folded norms have been put behind."""
    while node.op == "call_module" and not {"norm", "dropout_p"} & peek_meta(node).keys():
        node = node.args[0]  # type: ignore[assignment]
    return node


def _attention(state: _State, node: fx.Node) -> None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {name: argument(node, i) for i, name in enumerate(names)}
    options = {k: v for k, v in given.items() if k in ("is_causal", "scale", "enable_gqa") and v is not None}
    inc_meta(node)["options"] = options
    module = set_module(state.gm, f"attention_{node.name}", Attention(inc_meta(node)["dropout_p"], options))
    args = tuple(given[n] for n in ("query", "key", "value", "attn_mask"))
    new = _call(state, module, args, after=node, like=node)
    replace_uses(node, new)
    take_over(state.gm, node, new)
    state.gm.graph.erase_node(node)  # random, so nobody else would remove it


def _detach(state: _State) -> None:
    """Stop the gradients that the model stops.

    Before a fake quantizer that has no other readers, so that its scale is trained as layer by layer; else behind it.
    """
    gm = state.gm
    edges = {n: list(peek_meta(n)["detached"]) for n in gm.graph.nodes if "detached" in peek_meta(n)}
    if not edges:
        return
    kept: set[fx.Node] = set()  # values that are read with their gradient, too
    for node in gm.graph.nodes:
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        kept.update(v for i, v in enumerate(leaves) if isinstance(v, fx.Node) and i not in edges.get(node, ()))
    name = set_module(gm, "detach", Detach())
    made: dict[fx.Node, fx.Node] = {}
    for reader, places in edges.items():
        leaves, tree = pytree.tree_flatten((reader.args, reader.kwargs))
        for i in places:
            source = leaves[i]
            module = get_attr(gm, str(source.target)) if source.op == "call_module" else None
            before = isinstance(module, FakeQuantizer) and source not in kept
            if source not in made:
                value, at = (source.args[0], source) if before else (source, reader)
                made[source] = _call(state, name, (value,), before=at, like=value)
                if before:
                    source.args = (made[source],)
            leaves[i] = source if before else made[source]
        reader.args, reader.kwargs = pytree.tree_unflatten(leaves, tree)
