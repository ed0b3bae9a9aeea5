"""`load_state_dict` of a converted model: tensors into its Q-DQ graph, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.graph import clone
from inc_graph.quantization.moving import Once, moved

__all__ = ["load_tensors"]


def load_tensors(
    gm: fx.GraphModule, given: dict[str, Any], assign: bool
) -> tuple[fx.GraphModule | None, list[str], list[str], list[str]]:
    """(graph with the tensors, missing, unexpected, errors); the graph is None if there is an error or no tensor.

    Args:
        gm: At level "qdq". Its codes are written to; any other tensor may be the float model's too, and is replaced.
        given: Name -> tensor.
        assign: Take the tensors themselves instead of copies; they bring their device along.
    """
    known = nn.Module.state_dict(gm, keep_vars=True)
    missing = [name for name in known if name not in given]
    unexpected = [name for name in given if name not in known]
    found = {name: given[name] for name in known if name in given}
    errors = [text for name, tensor in found.items() if (text := _fault(name, tensor, known[name])) is not None]
    if errors or not found:
        return None, missing, unexpected, errors
    new = clone(gm)
    if assign:
        place = next(iter(found.values())).device
        there = moved(gm, Once(lambda t: t if t.device == place else torch.empty_like(t, device=place)))
        new = there if there is not None else new
    with torch.no_grad():
        for name, tensor in found.items():
            _put(new, name, tensor, assign)
    return new, missing, unexpected, []


def _fault(name: str, tensor: Any, old: Tensor) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"{name}: expected a tensor, got {type(tensor).__name__}"
    if tensor.shape != old.shape:
        return f"{name}: size mismatch: it has shape {list(tensor.shape)}, the model {list(old.shape)}"
    if tensor.dtype != old.dtype and not (tensor.is_floating_point() and old.is_floating_point()):
        return f"{name}: it is {tensor.dtype}, the model has {old.dtype}"
    return None


def _put(gm: fx.GraphModule, name: str, tensor: Tensor, assign: bool) -> None:
    prefix, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(prefix)
    parameter = owner._parameters.get(leaf) is not None
    old = owner._parameters[leaf] if parameter else owner._buffers[leaf]
    assert old is not None
    tensor = tensor.detach()
    if not assign and old.dtype in (torch.uint8, torch.int8):  # codes: ours, and maybe those of another layer, too
        old.copy_(tensor)
        return
    new = tensor.to(old.device, old.dtype)
    if not assign and new is tensor:
        new = tensor.clone()
    if parameter:
        owner._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
    else:
        owner._buffers[leaf] = new
