"""Runs of int8 layers as one operator, for torch.compile.

Each opaque operator costs inductor's generated code a call through Python. A network of fifty small layers pays that fifty
times; grouped into regions it pays once, and inductor loses nothing, because it could not see into the layers anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.graph import clone, erase_dead, insert_call, unique_name
from inc_graph.lowering import _codes, _onednn
from inc_graph.lowering._onednn import HAS_OPAQUE, Int8Layer, OpaqueBase

__all__ = ["Region", "group_layers"]

_STEPS = (
    _onednn.int8_layer,
    _onednn.int8_layer_add,
    _onednn.int8_layer_sum,
    _codes.spread,
    _codes.codes_to_unsigned,
)


@dataclass(frozen=True)
class _Slot:
    """A value inside a region: an input, or the result of an earlier step."""

    index: int


class Region(OpaqueBase):  # type: ignore[misc,valid-type]
    """Steps `slots.append(fn(*args))` over a list of slots that begins with the inputs; `outputs` are slot numbers."""

    def __init__(self, steps: Sequence[tuple[Any, tuple[Any, ...]]], outputs: Sequence[int]) -> None:
        self.steps, self.outputs = tuple(steps), tuple(outputs)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Execute on real tensors. No input is written to."""
        return self._walk(inputs, _execute)

    def empty_out(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the right shapes, dtypes and layouts, not filled."""
        return self._walk(inputs, _propagate)

    def _walk(self, inputs: Sequence[Tensor], call: Any) -> list[Tensor]:
        slots = list(inputs)
        for fn, args in self.steps:
            slots.append(call(fn, [slots[a.index] if isinstance(a, _Slot) else a for a in args]))
        return [slots[i] for i in self.outputs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self  # immutable

    def __repr__(self) -> str:
        return f"Region({len(self.steps)} steps)"


def _execute(fn: Any, args: list[Any]) -> Tensor:
    return args[-1].run(*args[:-1]) if isinstance(args[-1], Int8Layer) else fn(*args)


def _propagate(fn: Any, args: list[Any]) -> Tensor:
    return args[-1].empty_out(args[0]) if isinstance(args[-1], Int8Layer) else fn(*args)


if HAS_OPAQUE:
    from torch._library.opaque_object import get_opaque_type_name, register_opaque_type

    register_opaque_type(Region, typ="reference")
    _onednn._lib.define(f"region(Tensor[] inputs, {get_opaque_type_name(Region)} region) -> Tensor[]")
    _onednn._lib.impl("region", lambda inputs, region: _onednn._real(region).run(inputs), "CompositeExplicitAutograd")
    torch.library.register_fake(
        "inc_onednn::region", lambda inputs, region: _onednn._real(region).empty_out(inputs), lib=_onednn._lib
    )


def run_region(inputs: list[Tensor], region: Region) -> list[Tensor]:
    """Call target in the grouped graph."""
    return torch.ops.inc_onednn.region(inputs, region) if torch.compiler.is_compiling() else region.run(inputs)


def group_layers(gm: fx.GraphModule) -> fx.GraphModule | None:
    """A copy of a lowered graph with each run of two or more layers as one call; None if there is nothing to group."""
    if not HAS_OPAQUE:
        return None
    work = clone(gm)
    runs = [r for r in _runs(work.graph) if len(r) > 1]
    for run in runs:
        _replace(work, run)
    if not runs:
        return None
    erase_dead(work)
    return work


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    """Layers that follow each other with nothing but reads of attributes between them."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _STEPS:
            runs[-1].append(node)
        elif node.op != "get_attr" and runs[-1]:
            runs.append([])
    return runs


def _replace(gm: fx.GraphModule, run: list[fx.Node]) -> None:
    inside = set(run)
    inputs: dict[fx.Node, int] = {}
    for node in run:
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr":
                inputs.setdefault(source, len(inputs))
    slots: dict[fx.Node, int] = dict(inputs)
    steps: list[tuple[Any, tuple[Any, ...]]] = []

    def value(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return list(arg) if isinstance(arg, list | tuple) else arg
        return _Slot(slots[arg]) if arg in slots else getattr(gm, str(arg.target))

    count = len(inputs)
    for node in run:
        args = tuple(value(a) for a in node.args)
        if node.target is _onednn.int8_layer_sum and node.args[1] in inputs:  # it writes there: give it a copy
            steps.append((torch.clone, (args[1],)))
            args = (args[0], _Slot(count), args[2])
            count += 1
        steps.append((node.target, args))
        slots[node] = count
        count += 1
    outputs = [n for n in run if any(u not in inside for u in n.users)]
    name = unique_name(gm, "region")
    setattr(gm, name, Region(steps, [slots[n] for n in outputs]))
    first = run[-1]
    with gm.graph.inserting_after(first):
        read = gm.graph.create_node("get_attr", name, (), {})
    with gm.graph.inserting_after(read):
        call = gm.graph.create_node("call_function", run_region, (list(inputs), read), {})
    call.meta["val"] = [n.meta["val"] for n in outputs]
    for i, node in reversed(list(enumerate(outputs))):
        item = insert_call(gm, operator.getitem, (call, i), after=call, like=node)
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        gm.graph.erase_node(node)
