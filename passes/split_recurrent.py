"""Take LSTM and GRU apart where a rule quantizes them dynamically: products with inputs, and steps.

    lstm(x, (h, c), W)  =  for each layer and direction    lstm_steps(linear(x, W_ih, b_ih + b_hh), h, c, W_hh)
    gru(x, h, W)        =  for each layer and direction    gru_steps(linear(x, W_ih, b_ih), h, W_hh, b_hh)

of [T, N, *] and of packed sequences.

The products with the inputs of all steps are one linear layer, quantized as every other one: a scale for each row is a
scale for each step of each sequence. The recurrent weights are quantized, the state is not: a row of it is read once,
so that rounding it would save nothing; a weight that projects it is an operator of its own, `projection`. Exact, but
for the order of sums. A layer that a rule leaves float, or that the backend has no kernel for, stays whole, and why is
noted at its node.
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
from inc_graph.recurrent import GRU_STEPS, LAST_STEP, LSTM_STEPS, PROJECTION
from inc_graph.registry import PASSES

aten = torch.ops.aten

_TARGETS = {aten.lstm.input: "lstm", aten.gru.input: "gru", aten.lstm.data: "lstm", aten.gru.data: "gru"}
_NO_RULE = "no rule quantizes it"
_PACKED = (aten.lstm.data, aten.gru.data)


@PASSES.register("split-recurrent")
@dataclass(frozen=True)
class SplitRecurrent(Pass):
    """float -> float."""

    name: ClassVar[str] = "split-recurrent"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "float"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report, noted = PassReport(), False
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node.target not in _TARGETS:
                continue
            if (reason := _why_whole(gm, node)) is None:
                report.matched.append(node.name)
                _split(gm, node)
            else:
                report.missed.append((node.name, reason))
                if reason != _NO_RULE:
                    inc_meta(node)["whole"], noted = reason, True
        if report.matched:
            erase_dead(gm)
        return PassResult(gm, bool(report.matched) or noted, report)


def _why_whole(gm: fx.GraphModule, node: fx.Node) -> str | None:
    pattern, recipe, kind = pattern_of(node), get_recipe(gm), _TARGETS[node.target]
    found = None if pattern is None else recipe.resolve(node, pattern)
    if found is None or (what := found[1].what) is None or what.weight is None:
        return _NO_RULE
    if what.activation is None:
        return "its weights alone are not quantized: give its activations a format, too (act_dtype)"
    if not what.activation.dynamic:
        return "static ranges do not fit a state that is fed back through every step"
    if recipe.supported is not None and f"{kind}_steps" not in recipe.supported:
        return f"backend '{recipe.backend}' has no quantized kernel for {kind}"
    form = _Form.of(node)
    if form.train:
        return "it is in train mode"
    if any(not isinstance(p, fx.Node) or p.op != "get_attr" for p in form.params):
        return "its weights are computed at run time"
    return None


@dataclass(frozen=True)
class _Form:
    """The arguments of a layer, packed sequences or not."""

    kind: str
    x: fx.Node
    sizes: fx.Node | None
    states: list[fx.Node]
    params: list[Any]
    biased: bool
    layers: int
    train: bool
    directions: int
    batch_first: bool

    @classmethod
    def of(cls, node: fx.Node) -> _Form:
        kind, packed = _TARGETS[node.target], node.target in _PACKED
        x, sizes = argument(node, 0), argument(node, 1) if packed else None
        hx, params, biased, layers, _, train, both = (argument(node, i) for i in range(1 + packed, 8 + packed))
        states = list(hx) if kind == "lstm" else [hx]
        first = False if packed else bool(argument(node, 8))
        return cls(kind, x, sizes, states, list(params), bool(biased), layers, bool(train), 1 + bool(both), first)

    def weights(self, at: int) -> tuple[Any, Any, list[Any], Any]:
        """(of inputs, of the state, biases, projection) of layer and direction `at`."""
        each = len(self.params) // (self.layers * self.directions)
        own, recurrent, *rest = self.params[at * each : (at + 1) * each]
        biases = rest[:2] if self.biased else []
        return own, recurrent, biases, rest[-1] if len(rest) > len(biases) else None


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
    write, form = _Writer(gm, node), _Form.of(node)
    x = write(aten.transpose.int, form.x, 0, 1) if form.batch_first else form.x
    last: list[list[fx.Node]] = [[] for _ in form.states]
    for layer in range(form.layers):
        outs = []
        for direction in range(form.directions):
            at = layer * form.directions + direction
            first = [write(aten.select.int, s, 0, at) for s in form.states]
            steps = _steps(write, form, x, at, first, bool(direction))
            if form.sizes is None:
                end = write(aten.select.int, steps, 0, 0 if direction else -1)
            else:
                end = write(LAST_STEP, steps, first[0], form.sizes, bool(direction))
            size = (shape(first[0]) or ())[1]
            both = form.kind == "lstm"
            for found, (low, high) in zip(last, ((0, size), (size, (shape(end) or ())[1])), strict=False):
                found.append(write(aten.slice.Tensor, end, 1, low, high) if both else end)
            outs.append(write(aten.slice.Tensor, steps, 2 if form.sizes is None else 1, 0, size) if both else steps)
        x = outs[0] if form.directions == 1 else write(aten.cat.default, outs, -1)
    x = write(aten.transpose.int, x, 0, 1) if form.batch_first else x
    _replace(write, node, [x, *(write(aten.stack.default, found) for found in last)])


def _steps(write: _Writer, form: _Form, x: fx.Node, at: int, states: list[fx.Node], reverse: bool) -> fx.Node:
    own, recurrent, biases, projection = form.weights(at)
    sizes = () if form.sizes is None else (form.sizes,)
    if form.kind == "gru":
        gates = write.layer(aten.linear.default, x, own, biases[0] if biases else None)
        return write.layer(GRU_STEPS, gates, *states, recurrent, biases[1] if biases else None, reverse, *sizes)
    bias = None
    if biases:
        both = [get_tensor(write.gm, b).detach() for b in biases]
        name = set_tensor(write.gm, f"{str(biases[0].target).replace('.', '_')}_sum", both[0] + both[1])
        bias = insert_get_attr(write.gm, write.node, name)
    gates = write.layer(aten.linear.default, x, own, bias)
    if projection is None:
        return write.layer(LSTM_STEPS, gates, *states, recurrent, reverse, *sizes)
    small = write.layer(PROJECTION, projection)
    return write.layer(LSTM_STEPS, gates, *states, recurrent, reverse, form.sizes, small)


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
