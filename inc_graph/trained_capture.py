"""What the exporter would lose of a model that is captured with its gradients.

It runs the forward of a `torch.autograd.Function` and notes the operators in it: the backward that the model gives it
would be gone without a word. Reentrant gradient checkpointing is such a function, and one that only saves memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from inc_graph.errors import CaptureError

__all__ = ["keep_gradients", "settle_detach"]

aten = torch.ops.aten


@contextlib.contextmanager
def keep_gradients() -> Iterator[None]:
    """Refuse functions with a backward of their own within the block, where a gradient comes to them; in this thread.

    Raises:
        CaptureError: names the function.
    """
    original = torch.autograd.Function.__dict__["apply"]
    thread = threading.get_ident()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if threading.get_ident() != thread or not trained:
            return original.__get__(None, cls)(*args, **kwargs)
        if issubclass(cls, CheckpointFunction):
            run, _, *inputs = args
            return run(*inputs)
        text = f"the backward of {cls.__qualname__}, a torch.autograd.Function, would be lost in a graph"
        hint = "write it with torch operators, such as y + (f(y) - y).detach()"
        raise CaptureError(text, hint=hint)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def settle_detach(program: Any) -> None:
    """`y.detach_()` as `y.detach()`, for all who read `y` after it: in an ExportedProgram, in place."""
    for old, new in _settle(program.graph_module).items():
        program.graph_signature.replace_all_uses(old, new)


def _settle(gm: fx.GraphModule) -> dict[str, str]:
    """Returns {old: new} for output names that changed."""
    renamed: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.detach_.default):
        node.target, source = aten.detach.default, node.args[0]
        for user in [u for u in source.users if u > node]:
            user.replace_input_with(source, node)
            if user.op == "output":
                renamed[source.name] = node.name
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            _settle(child)
    return renamed
