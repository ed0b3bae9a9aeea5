"""Compute weights and biases that the model makes of its parameters at each call.

    linear(x, split(W)[1]) = linear(x, W')      linear(x, to(W, bfloat16)) = linear(x, W')      W' computed once, here
    linear(x, g * V / |V|) = linear(x, W')

So projections that share one matrix (`torch.nn.MultiheadAttention`), weights cast by autocast and parametrized weights
become weights like others. Only what ends as the weight or bias of a layer is computed: nothing else gets larger.
`fold_factors` is for passes that change the factors of products.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.graph import (
    erase_dead,
    get_attr,
    insert_get_attr,
    is_float,
    mutated_attrs,
    replace_uses,
    set_tensor,
    take_fuel,
    val,
)
from inc_graph.oppattern import argument, pattern_of
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES

__all__ = ["FoldConstants", "fold_factors"]


@dataclass
class _State:
    gm: fx.GraphModule
    mutated: set[str]
    constant: dict[fx.Node, bool] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)  # folded node -> attribute that holds its value


def fold_factors(gm: fx.GraphModule) -> list[str]:
    """Compute the factors of products that are made of parameters, such as the `1 + w` of a norm, where the result is
    no larger than these. Returns the names of what was computed."""
    state, done = _State(gm, mutated_attrs(gm)), list[str]()
    for product in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
        for node in product.all_input_nodes:
            if node.op == "get_attr" or not _is_constant(node, state) or not is_float(node):
                continue
            if val(node).numel() <= max(val(n).numel() for n in _parameters(node)):
                _fold(state, node, product)
                done.append(node.name)
    if done:
        erase_dead(gm)
    return done


def _parameters(root: fx.Node) -> set[fx.Node]:
    """What a constant is made of."""
    found, todo = set[fx.Node](), [root]
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            found.add(node)
        todo += node.all_input_nodes
    return found


@PASSES.register("fold-constants")
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace constant expressions in weight and bias positions by their values."""

    name: ClassVar[str] = "fold-constants"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "float"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        state = _State(gm, mutated_attrs(gm))
        for layer in list(gm.graph.nodes):
            pattern = pattern_of(layer)
            if pattern is None or pattern.weight is None:
                continue
            for position in (pattern.weight, pattern.bias):
                node = None if position is None else argument(layer, position)
                if not isinstance(node, fx.Node) or node.op == "get_attr" or not _is_constant(node, state):
                    continue
                if not isinstance(val(node), torch.Tensor) or not take_fuel():
                    continue
                _fold(state, node, layer)
                report.matched.append(node.name)
        if report.matched:
            erase_dead(gm)
        return PassResult(gm, bool(report.matched), report)


def _is_constant(root: fx.Node, state: _State) -> bool:
    """Whether a node's value is the same at each call: made of parameters by operators that neither write nor draw."""
    todo = [root]
    while todo:
        node = todo[-1]
        if node in state.constant:
            todo.pop()
        elif node.op == "get_attr":
            state.constant[node] = node.target not in state.mutated and isinstance(val(node), torch.Tensor)
        elif node.op != "call_function" or not _is_pure(node) or not node.all_input_nodes:
            state.constant[node] = False
        elif unknown := [n for n in node.all_input_nodes if n not in state.constant]:
            todo += unknown
        else:
            state.constant[node] = all(state.constant[n] for n in node.all_input_nodes)
    return state.constant[root]


def _is_pure(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # a plain function: only the choice of one of several results is known
        return getattr(node.target, "__name__", "") == "getitem"
    tags = getattr(node.target, "tags", ())
    return not schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags


def _value(state: _State, root: fx.Node) -> Any:
    todo = [root]
    while todo:
        node = todo[-1]
        if node in state.values:
            todo.pop()
        elif node.op == "get_attr":
            state.values[node] = get_attr(state.gm, str(node.target)).detach()
        elif unknown := [n for n in node.all_input_nodes if n not in state.values]:
            todo += unknown
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: state.values[n])
            state.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return state.values[root]


def _fold(state: _State, node: fx.Node, layer: fx.Node) -> None:
    if node not in state.names:
        with torch.no_grad():
            value = _value(state, node)
        source = node
        while source.op != "get_attr":
            source = source.all_input_nodes[0]
        state.names[node] = set_tensor(state.gm, f"{source.target}_folded", value)
    replace_uses(node, insert_get_attr(state.gm, layer, state.names[node]), only=[layer])
