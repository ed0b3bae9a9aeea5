"""Take LSTM and GRU apart where a rule quantizes them dynamically: products with inputs, and steps.

    lstm(x, (h, c), W)  =  for each layer and direction    lstm_steps(linear(x, W_ih, b_ih + b_hh), h, c, W_hh)
    gru(x, h, W)        =  for each layer and direction    gru_steps(linear(x, W_ih, b_ih), h, W_hh, b_hh)

The products with the inputs of all steps are one linear layer, quantized as every other one: a scale for each row is a
scale for each step of each sequence. The recurrent weights are quantized, the state is not: a row of it is read once,
so that rounding it would save nothing. Exact, but for the order of sums. A layer that a rule leaves float, or that the
backend has no kernel for, stays whole.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.graph import erase_dead, get_tensor, inc_meta, insert_call, insert_get_attr, set_tensor, shape, val
from inc_graph.oppattern import argument, pattern_of
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.recipe import get_recipe
from inc_graph.recurrent import GRU_STEPS, LSTM_STEPS
from inc_graph.registry import PASSES

aten = torch.ops.aten

_TARGETS = {aten.lstm.input: "lstm", aten.gru.input: "gru"}


@PASSES.register("split-recurrent")
@dataclass(frozen=True)
class SplitRecurrent(Pass):
    """float -> float."""

    name: ClassVar[str] = "split-recurrent"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "float"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in _TARGETS:
                continue
            if (reason := _why_whole(gm, node)) is None:
                report.matched.append(node.name)
                _split(gm, node)
            else:
                report.missed.append((node.name, reason))
        if report.matched:
            erase_dead(gm)
        return PassResult(gm, bool(report.matched), report)


def _why_whole(gm: fx.GraphModule, node: fx.Node) -> str | None:
    pattern, recipe, kind = pattern_of(node), get_recipe(gm), _TARGETS[node.target]
    found = None if pattern is None else recipe.resolve(node, pattern)
    if found is None or (what := found[1].what) is None or what.weight is None:
        return "no rule quantizes it"
    if what.activation is None or not what.activation.dynamic:
        return "static ranges do not fit a state that is fed back through every step"
    if recipe.supported is not None and f"{kind}_steps" not in recipe.supported:
        return f"backend '{recipe.backend}' has no quantized kernel for {kind}"
    params: Any = argument(node, 2)
    layers, train, both = (argument(node, i) for i in (4, 6, 7))
    if train:
        return "it is in train mode"
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" for p in params):
        return "its weights are computed at run time"
    if len(params) != layers * (1 + bool(both)) * (4 if argument(node, 3) else 2):
        return "it projects its state"
    return None


@dataclass
class _Writer:
    """Writes calls in front of one node."""

    gm: fx.GraphModule
    node: fx.Node

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        return insert_call(self.gm, target, args, before=self.node, like=self.node)

    def layer(self, target: Any, *args: Any) -> fx.Node:
        """A call that rules know by the layer that it is a part of."""
        call = self(target, *args)
        inc_meta(call)["was"] = _TARGETS[self.node.target]
        return call


def _split(gm: fx.GraphModule, node: fx.Node) -> None:
    write, kind = _Writer(gm, node), _TARGETS[node.target]
    biased, layers, both, batch_first = (argument(node, i) for i in (3, 4, 7, 8))
    params: Any = argument(node, 2)
    states: Any = argument(node, 1)
    states = list(states) if kind == "lstm" else [states]
    each, directions = 4 if biased else 2, 1 + bool(both)
    x: Any = argument(node, 0)
    x = write(aten.transpose.int, x, 0, 1) if batch_first else x
    last: list[list[fx.Node]] = [[] for _ in states]
    for layer in range(layers):
        outs = []
        for direction in range(directions):
            at = layer * directions + direction
            weights = params[at * each : (at + 1) * each]
            first = [write(aten.select.int, s, 0, at) for s in states]
            steps = _steps(write, kind, x, weights, first, bool(direction))
            size = (shape(weights[1]) or ())[1]
            end = write(aten.select.int, steps, 0, 0 if direction else -1)
            for i, found in enumerate(last):
                found.append(write(aten.slice.Tensor, end, 1, i * size, (i + 1) * size) if kind == "lstm" else end)
            outs.append(write(aten.slice.Tensor, steps, 2, 0, size) if kind == "lstm" else steps)
        x = outs[0] if directions == 1 else write(aten.cat.default, outs, -1)
    x = write(aten.transpose.int, x, 0, 1) if batch_first else x
    _replace(write, node, [x, *(write(aten.stack.default, found) for found in last)])


def _steps(
    write: _Writer, kind: str, x: fx.Node, weights: list[fx.Node], states: list[fx.Node], reverse: bool
) -> fx.Node:
    own, recurrent, *biases = weights
    if kind == "gru":
        gates = write.layer(aten.linear.default, x, own, biases[0] if biases else None)
        return write.layer(GRU_STEPS, gates, *states, recurrent, biases[1] if biases else None, reverse)
    bias = None
    if biases:
        both = [get_tensor(write.gm, b).detach() for b in biases]
        name = set_tensor(write.gm, f"{str(biases[0].target).replace('.', '_')}_sum", both[0] + both[1])
        bias = insert_get_attr(write.gm, write.node, name)
    gates = write.layer(aten.linear.default, x, own, bias)
    return write.layer(LSTM_STEPS, gates, *states, recurrent, reverse)


def _replace(write: _Writer, node: fx.Node, results: list[fx.Node]) -> None:
    for user in list(node.users):
        if user.target is not operator.getitem:  # all results as a tuple, which nothing in the normal form reads
            continue
        new, old = results[user.args[1]], val(user)  # type: ignore[index]
        if val(new).is_contiguous() != old.is_contiguous():
            new = write(aten.contiguous.default, new)
        user.replace_all_uses_with(new)
        write.gm.graph.erase_node(user)
    if not node.users:  # torch takes it for a random operator, which nobody else would dare to erase
        write.gm.graph.erase_node(node)
