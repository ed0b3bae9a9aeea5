"""Runs of int8 layers as one operator, for torch.compile.

Each opaque operator costs inductor's generated code a call through Python. A network of fifty small layers pays that
fifty times; grouped into regions it pays once, and inductor loses nothing: it could not see into the layers anyway.

A torch without opaque operators (before 2.9) would break its graph at each layer instead, and recompile for each shape:
there the whole lowered graph stays outside of torch.compile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.graph import clone, erase_dead, get_attr, insert_call, unique_name
from inc_graph.lowering import _codes, _half, _onednn
from inc_graph.lowering._half import HalfLayer
from inc_graph.lowering._onednn import HAS_OPAQUE, Int8Layer, OpaqueBase

__all__ = ["NotTraced", "Region", "for_compile", "run_region"]

_STEPS = (
    _onednn.int8_layer,
    _onednn.int8_layer_add,
    _onednn.int8_layer_sum,
    _codes.spread,
    _codes.codes_to_unsigned,
    _half.half_layer,
    _half.half_layer_add,
)
_LAYERS = (Int8Layer, HalfLayer)


@dataclass(frozen=True)
class _Slot:
    """A value inside a region: an input, or the result of an earlier step."""

    index: int


@dataclass(frozen=True)
class Step:
    """`fn(*args)` makes the next slot; the slots `done` are not read after it."""

    fn: Callable[..., Tensor]
    args: tuple[Any, ...]
    done: tuple[int, ...] = ()


class Region(OpaqueBase):  # type: ignore[misc,valid-type]
    """Steps over a list of slots that begins with the inputs; `outputs` are slot numbers. Immutable."""

    def __init__(self, steps: Sequence[tuple[Callable[..., Tensor], tuple[Any, ...]]], outputs: Sequence[int]) -> None:
        last: dict[int, int] = {}
        for i, (_, args) in enumerate(steps):
            last.update((a.index, i) for a in args if isinstance(a, _Slot))
        ends: dict[int, list[int]] = {}
        for slot, i in last.items():
            if slot not in outputs:
                ends.setdefault(i, []).append(slot)
        self.steps = tuple(Step(fn, args, tuple(ends.get(i, ()))) for i, (fn, args) in enumerate(steps))
        self.outputs = tuple(outputs)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Execute on real tensors. No input is written to."""
        return self._walk(inputs, _execute)

    def empty_out(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the right shapes, dtypes and layouts, not filled."""
        return self._walk(inputs, _propagate)

    def gradients(self, grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of the inputs, given those of the outputs; zeros where none passes (through codes)."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            outs = self._walk(leaves, lambda fn, args: fn(*args))
        pairs = [(y, g) for y, g in zip(outs, grads, strict=True) if y.requires_grad]
        wanted = [x for x in leaves if x.requires_grad]
        if not pairs or not wanted:
            return [torch.zeros_like(x) for x in inputs]
        ys, gs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, wanted, gs, allow_unused=True))
        given = [next(found) if x.requires_grad else None for x in leaves]
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, given, strict=True)]

    def _walk(self, inputs: Sequence[Tensor], call: Callable[..., Tensor]) -> list[Tensor]:
        slots: list[Any] = list(inputs)
        for step in self.steps:
            slots.append(call(step.fn, [slots[a.index] if isinstance(a, _Slot) else a for a in step.args]))
            for i in step.done:  # memory is free again as soon as it would be without the region
                slots[i] = None
        return [slots[i] for i in self.outputs]

    def __copy__(self) -> Region:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _onednn.NotPickled("a region of layers that are packed for this machine's oneDNN cannot be pickled")

    def __repr__(self) -> str:
        return f"Region({len(self.steps)} steps)"


def _execute(fn: Callable[..., Tensor], args: list[Any]) -> Tensor:
    return args[-1].run(*args[:-1]) if isinstance(args[-1], _LAYERS) else fn(*args)


def _propagate(fn: Callable[..., Tensor], args: list[Any]) -> Tensor:
    return args[-1].empty_out(args[0]) if isinstance(args[-1], _LAYERS) else fn(*args)


if HAS_OPAQUE:
    from torch._library.opaque_object import get_opaque_type_name, register_opaque_type

    register_opaque_type(Region, typ="reference")
    _onednn.define(
        f"region(Tensor[] inputs, {get_opaque_type_name(Region)} region) -> Tensor[]",
        lambda inputs, region: _onednn.real(region).run(inputs),
        lambda inputs, region: _onednn.real(region).empty_out(inputs),
    )
    _onednn.define(
        f"region_gradient(Tensor[] grads, Tensor[] inputs, {get_opaque_type_name(Region)} region) -> Tensor[]",
        lambda grads, inputs, region: _onednn.real(region).gradients(grads, inputs),
        lambda grads, inputs, region: [torch.empty_like(x) for x in inputs],
    )

    def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, ctx.region = inputs
        ctx.save_for_backward(*tensors)

    def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        inputs = list(ctx.saved_tensors)
        found = torch.ops.inc_onednn.region_gradient(list(grads), inputs, ctx.region)
        return [g if x.is_floating_point() else None for g, x in zip(found, inputs, strict=True)], None

    torch.library.register_autograd("inc_onednn::region", _backward, setup_context=_keep, lib=_onednn.LIBRARY)


def run_region(inputs: list[Tensor], region: Region) -> list[Tensor]:
    """Call target in the grouped graph."""
    return torch.ops.inc_onednn.region(inputs, region) if torch.compiler.is_compiling() else region.run(inputs)


class NotTraced(nn.Module):
    """A graph that torch.compile calls without looking into it."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*args, **kwargs)


def for_compile(gm: fx.GraphModule) -> nn.Module:
    """A copy of a lowered graph with each run of two or more layers as one call; the graph itself if it has none.

    Linear in the size of the graph.
    """
    if not HAS_OPAQUE:
        return NotTraced(gm) if any(n.target in _STEPS for n in gm.graph.nodes) else gm
    if not any(len(run) > 1 for run in _runs(gm.graph)):
        return gm
    work = clone(gm)
    for run in _runs(work.graph):
        if len(run) > 1:
            _replace(work, run)
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
    layers = {i: get_attr(gm, str(i.target)) for n in run for i in n.all_input_nodes if i.op == "get_attr"}
    layers = {node: value for node, value in layers.items() if isinstance(value, _LAYERS)}
    slots: dict[fx.Node, int] = {}
    for node in run:
        for source in node.all_input_nodes:
            if source not in inside and source not in layers:
                slots.setdefault(source, len(slots))
    inputs, count = list(slots), len(slots)
    steps: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []

    def value(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return list(arg) if isinstance(arg, list | tuple) else arg
        return layers[arg] if arg in layers else _Slot(slots[arg])

    for node in run:
        args = tuple(value(a) for a in node.args)
        if node.target is _onednn.int8_layer_sum and node.args[1] in inputs:  # it writes there: give it a copy
            steps.append((torch.clone, (args[1],)))
            args = (args[0], _Slot(count), args[2])
            count += 1
        steps.append((node.target, args))  # type: ignore[arg-type]
        slots[node] = count
        count += 1
    outputs = [n for n in run if any(u not in inside for u in n.users)]
    name = unique_name(gm, "region")
    setattr(gm, name, Region(steps, [slots[n] for n in outputs]))
    with gm.graph.inserting_after(run[-1]):
        read = gm.graph.create_node("get_attr", name, (), {})
    with gm.graph.inserting_after(read):
        call = gm.graph.create_node("call_function", run_region, (inputs, read), {})
    call.meta["val"] = [n.meta["val"] for n in outputs]
    after = call
    for i, node in enumerate(outputs):
        after = insert_call(gm, operator.getitem, (call, i), after=after, like=node)
        node.replace_all_uses_with(after, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        gm.graph.erase_node(node)
