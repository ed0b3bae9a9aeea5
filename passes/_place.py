"""New nodes for a whole graph: where they go, and their fake values without running an operator for each.

A graph with ten thousand quantized values gets forty thousand nodes from one pass. Those of one shape have one fake
value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from inc_graph.graph import current_pass, fake_call, inc_meta, insert_get_attr, set_tensor

__all__ = ["Maker", "behind", "head", "stamp"]


def head(gm: fx.GraphModule) -> fx.Node:
    """The first node behind the inputs: constants of the whole graph are read before it."""
    last = None
    for node in gm.graph.find_nodes(op="placeholder"):
        last = node
    return next(iter(gm.graph.nodes)) if last is None else last.next


def behind(gm: fx.GraphModule, value: fx.Node, first: fx.Node) -> Any:
    """Context in which new nodes stand after `value`, but not between the inputs (`first`: `head(gm)`)."""
    return gm.graph.inserting_before(first) if value < first else gm.graph.inserting_after(value)


def stamp(node: fx.Node, like: fx.Node) -> None:
    """Give a new node the module path and source line of `like`, and the name of the pass that made it."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    if (name := current_pass()) is not None:
        inc_meta(node).setdefault("provenance", []).append(name)


@dataclass
class Maker:
    """Makes calls and attribute reads in one graph."""

    gm: fx.GraphModule
    first: fx.Node = field(init=False)
    known: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = head(self.gm)

    def read(self, name_hint: str, tensor: torch.Tensor) -> fx.Node:
        """Register a tensor and read it in front of everything that is computed."""
        name = set_tensor(self.gm, name_hint, tensor)
        key = (tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if key not in self.known:
            node = insert_get_attr(self.gm, self.first, name)
            self.known[key] = node.meta["val"]
            return node
        with self.gm.graph.inserting_before(self.first):
            node = self.gm.graph.get_attr(name)
        node.meta["val"] = self.known[key]
        if (by := current_pass()) is not None:
            inc_meta(node)["provenance"] = [by]
        return node

    def call(self, target: Any, args: tuple[Any, ...], after: fx.Node, like: fx.Node) -> fx.Node:
        """Call an operator whose result depends on the dtypes, shapes and strides of its arguments only."""
        key = (target, *(_signature(a) for a in args))
        if key not in self.known:
            self.known[key] = fake_call(self.gm, target, args, {})
        with behind(self.gm, after, self.first):
            node = self.gm.graph.call_function(target, args)
        node.meta["val"] = self.known[key]
        stamp(node, like)
        return node


def _signature(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        value = arg.meta["val"]
        return value.dtype, value.device, str(value.shape), str(value.stride())  # text: comparing symbols adds guards
    return str(arg)
