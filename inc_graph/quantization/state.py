"""`load_state_dict` of a converted model: tensors into its Q-DQ graph, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.graph import clone, val
from inc_graph.ops import DEQUANTIZE
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
    free = _scales(gm)
    faults = (_fault(name, tensor, known[name], name in free) for name, tensor in found.items())
    errors = [text for text in faults if text is not None]
    if errors or not found:
        return None, missing, unexpected, errors
    new = clone(gm)
    if assign:
        place = next(iter(found.values())).device
        there = moved(gm, Once(lambda t: t if t.device == place else torch.empty_like(t, device=place)))
        new = there if there is not None else new
    with torch.no_grad():
        for name, tensor in found.items():
            _put(new, name, tensor, assign, name in free)
    _retype(new)
    return new, missing, unexpected, []


def _scales(gm: fx.GraphModule) -> set[str]:
    """Names of scales and zero points that are no codes themselves: their dtype is what their values need."""
    read = [a for n in gm.graph.nodes if n.target == DEQUANTIZE for a in n.args[1:3] if isinstance(a, fx.Node)]
    codes = {n.args[0] for n in gm.graph.nodes if n.target == DEQUANTIZE}
    return {str(a.target) for a in read if a.op == "get_attr" and a not in codes}


def _retype(gm: fx.GraphModule) -> None:
    """The graph's values of tensors that have another dtype now."""
    known = nn.Module.state_dict(gm, keep_vars=True)
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = known.get(str(node.target))
        if tensor is not None and (fake := val(node)) is not None and fake.dtype != tensor.dtype:
            node.meta["val"] = fake.to(tensor.dtype)


def _fault(name: str, tensor: Any, old: Tensor, free: bool) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"{name}: expected a tensor, got {type(tensor).__name__}"
    if tensor.shape != old.shape:
        return f"{name}: size mismatch: it has shape {list(tensor.shape)}, the model {list(old.shape)}"
    kind = tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool
    if tensor.dtype != old.dtype and not (
        kind == (old.is_floating_point(), old.is_complex(), old.dtype == torch.bool) and (kind[0] or free)
    ):
        return f"{name}: it is {tensor.dtype}, the model has {old.dtype}"
    return None


def _loses(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the values of scales or zero points are others in this dtype."""
    return tensor.dtype != dtype and not torch.equal(tensor.to(dtype).double(), tensor.double())


def _put(gm: fx.GraphModule, name: str, tensor: Tensor, assign: bool, free: bool) -> None:
    prefix, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(prefix)
    parameter = owner._parameters.get(leaf) is not None
    old = owner._parameters[leaf] if parameter else owner._buffers[leaf]
    assert old is not None
    tensor = tensor.detach()
    if free and _loses(tensor, old.dtype):
        owner._buffers[leaf] = tensor.to(old.device, copy=not assign)
        return
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
