"""A word where gradients end: at values that become codes when the model runs.

Rounding has no derivative, and the kernels give none. What autograd would do by itself is silent: a sum around such a
layer still has a gradient, that of its other addend, and parameters before the layer learn from it alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from inc_graph.errors import IncWarning
from inc_graph.graph import module_path, users_of
from inc_graph.ops import QUANTIZE

__all__ = ["Cut"]


class Cut:
    """Says once, when a gradient arrives, that it goes no further. Of one model.

    Args:
        layer: Name of a layer where gradients end.
        behind: For each output of the graph whether it comes from such a layer.

    Attributes:
        told: The layer, once it was said. The layers of one model share this list.
    """

    def __init__(self, layer: str, behind: tuple[bool, ...]) -> None:
        self.layer, self.behind = layer, behind
        self.told: list[str] = []

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Cut | None:
        """Of a Q-DQ graph; None if only constants are codes in it."""
        varies: set[fx.Node] = set()
        behind: set[fx.Node] = set()
        first = None
        for node in gm.graph.nodes:
            if node.op == "placeholder" or not varies.isdisjoint(node.all_input_nodes):
                varies.add(node)
            if node.target == QUANTIZE and node.args[0] in varies:
                readers = [layer for back in users_of(node) for layer in users_of(back)]
                first = first or next(filter(None, map(module_path, readers)), node.name)
                behind.add(node)
            elif not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
        outputs = pytree.tree_leaves(gm.graph.output_node().args[0])
        return None if first is None else cls(first, tuple(y in behind for y in outputs))

    def marked(self, out: Any, inputs: Any) -> Any:
        """`out`, whose tensors tell when a gradient comes to them; itself where none can come."""
        if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            return out
        asked = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        values, spec = pytree.tree_flatten(out)
        if len(values) != len(self.behind):
            return out
        pairs = zip(values, self.behind, strict=True)
        return pytree.tree_unflatten([self._marked(y, asked) if behind else y for y, behind in pairs], spec)

    def _marked(self, y: Any, asked: list[Tensor]) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        if y.requires_grad:
            y.register_hook(self.say)
            return y
        return _End.apply(self, y.clone() if y._is_view() else y, *asked) if asked else y

    def say(self, grad: Tensor | None = None) -> None:
        """Warn, the first time of all with this list."""
        if not self.told:
            self.told.append(self.layer)
            text = (
                f"no gradient passes through layers whose inputs are quantized, such as {self.layer!r}: what comes "
                "before them gets none, or that of the ways around them. prepare_qat trains with quantization; "
                "torch.no_grad(), or detach(), says that none is wanted"
            )
            warnings.warn(text, IncWarning, stacklevel=2)


class _End(torch.autograd.Function):
    """A result that has come from its inputs, and has no derivative."""

    @staticmethod
    def forward(ctx: Any, cut: Cut, y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.cut, ctx.count = cut, len(inputs)
        ctx.mark_dirty(y)  # the same tensor, not a view of it
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.cut.say()
        return (None,) * (2 + ctx.count)
