"""The float graphs of layers: one export serves all layers of one form, and nearly all linear layers are of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.capture import capture
from inc_graph.errors import CaptureError
from inc_graph.graph import clone
from inc_graph.quantization.leaf import bare

__all__ = ["Captures"]

aten = torch.ops.aten


class Captures:
    """One export for all layers of one form: their graphs differ in their tensors only.

    Exporting costs a few tenths of a second, and a transformer has hundreds of layers of a handful of shapes. A linear
    layer of another size is not exported again: its graph is that of the first, with other sizes in it.
    """

    def __init__(self) -> None:
        self._known: dict[Any, fx.GraphModule] = {}
        self._linear: dict[Any, fx.GraphModule] = {}

    def get(self, module: nn.Module, path: str, examples: tuple[Tensor, ...], dims: tuple[Any, ...]) -> fx.GraphModule:
        """The float graph of a layer; its parameters are the layer's own. CaptureError, which names the layer."""
        tensors = {n: (tuple(t.shape), t.dtype, t.device) for n, t in module.named_parameters()}
        key = (type(module), repr(module), tuple(sorted(tensors.items(), key=str)))
        if key not in self._known:
            try:
                self._known[key] = self._capture(module, examples, dims)
            except CaptureError as e:
                raise CaptureError(e.message, module=path, hint=e.hint) from e
        gm = clone(self._known[key])
        for name, tensor in module.named_parameters():
            if name in gm._parameters:
                gm._parameters[name] = tensor
        gm._forward_pre_hooks.clear()  # the leaf checks its input itself
        gm._forward_pre_hooks_with_kwargs.clear()
        return gm

    def _capture(self, module: nn.Module, examples: tuple[Tensor, ...], dims: tuple[Any, ...]) -> fx.GraphModule:
        plain = type(module) is nn.Linear
        kinds = tuple((n, t.dtype, t.device) for n, t in module.named_parameters())
        if plain and kinds in self._linear and (found := _resized(self._linear[kinds], module)) is not None:
            return found
        made = capture(bare(module), examples, dynamic_shapes=_dims(dims))
        if plain:
            self._linear[kinds] = made
        return made


def _resized(gm: fx.GraphModule, module: nn.Module) -> fx.GraphModule | None:
    """The graph of a linear layer for one of another size; None if it is not the graph that is expected."""
    nodes = {n.op if n.op != "get_attr" else str(n.target): n for n in gm.graph.nodes}
    names = {"placeholder", "call_function", "output", *(n for n, _ in module.named_parameters())}
    if set(nodes) != names or len(nodes) != len(gm.graph.nodes) or nodes["call_function"].target != aten.linear.default:
        return None
    new = clone(gm)
    nodes = {n.op if n.op != "get_attr" else str(n.target): n for n in new.graph.nodes}
    x, weight = nodes["placeholder"], module.get_parameter("weight")
    rows, mode = x.meta["val"].shape[0], x.meta["val"].fake_mode
    with mode:
        for name, size in (("placeholder", weight.shape[1]), ("call_function", weight.shape[0])):
            nodes[name].meta["val"] = torch.empty(rows, size, dtype=weight.dtype, device=weight.device)
        for name, tensor in module.named_parameters():
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            nodes[name].meta["val"] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            new._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    for node in new.graph.nodes:
        node.meta.pop("tensor_meta", None)
    for leaf in new.meta["inc"]["inputs"]["leaves"]:
        leaf["shape"] = [*leaf["shape"][:-1], weight.shape[1]]
    return new


def _dims(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """As the exporter wants them: the states of an LSTM are one variable argument."""
    return (*dims[:2], dims[2:]) if len(dims) > 1 else dims
