"""A Q-DQ graph on another device, or in another floating point dtype.

A graph says its dtype and device in many places: tensors, constants among the arguments, fake values, what it checks of
its inputs. Here they all change together. What stays as it is:

    scales, zero points, codes    a scale in half precision would be another quantization
    what is made of integers      positions, masks, rotary angles: bfloat16 cannot count beyond 256. It is cast where it
                                  meets values of the model, as the float model does
    casts to another dtype        than the model's own: a norm that computes in float32 inside of a bfloat16 model
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from inc_graph.graph import clone, get_attr, insert_call, is_float, val
from inc_graph.oppattern import argument
from inc_graph.ops import is_choose_qparams, is_dequantize, is_fake_quantize, is_quantize

__all__ = ["Once", "moved"]

aten = torch.ops.aten

# what a float value is computed from
_MODEL = "weights and inputs"
_WHOLE = "integers"
_CONSTANT = "buffers alone"


class Once:
    """What `_apply` gives each tensor, with one result for a quantized tensor that several layers share."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn
        self.known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}  # keeps the old ones alive: their ids are keys

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.fn(tensor)

    def of(self, tensor: Tensor, keep_dtype: bool) -> Tensor:
        """The new tensor; `keep_dtype`: in the dtype of the old one."""
        key = (id(tensor), keep_dtype)
        if key not in self.known:
            with torch.no_grad():
                new = self.fn(tensor)
                if keep_dtype and new.dtype != tensor.dtype:
                    new = tensor if new.device == tensor.device else tensor.detach().to(new.device)
            if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                new = nn.Parameter(new.detach(), requires_grad=tensor.requires_grad)
            self.known[key] = tensor, new
        return self.known[key][1]


@dataclass
class _Change:
    once: Once
    dtypes: dict[torch.dtype, torch.dtype] = field(default_factory=dict)  # of the model's own floats
    devices: dict[torch.device, torch.device] = field(default_factory=dict)
    touched: bool = False  # whether any tensor became another one

    def value(self, x: Any, cast: bool) -> Any:
        """A fake value after the change."""
        if not isinstance(x, Tensor):
            return x
        dtype = self.dtypes.get(x.dtype, x.dtype) if cast else x.dtype
        device = self.devices.get(x.device, x.device)
        return x if (dtype, device) == (x.dtype, x.device) else x.to(device=device, dtype=dtype)

    def constant(self, x: Any, cast: bool) -> Any:
        """A constant among the arguments of a call after the change."""
        if isinstance(x, torch.device):
            return self.devices.get(x, x)
        if cast and isinstance(x, torch.dtype):
            return self.dtypes.get(x, x)
        if cast and type(x) is float and math.isfinite(x):  # the lowest value of float32, in a mask, is none of float16
            limit = min((torch.finfo(d).max for d in self.dtypes.values()), default=math.inf)
            return min(max(x, -limit), limit)
        return x


def moved(gm: fx.GraphModule, once: Once) -> fx.GraphModule | None:
    """A copy of a Q-DQ graph after a change of dtype or device; None if `once` gives every tensor back as it is.

    The copy is not recompiled.

    Args:
        gm: At level "qdq", with nothing packed. It is not changed.
        once: Of the function that `nn.Module._apply` has got.
    """
    new = clone(gm)
    change = _Change(once)
    for graph in _graphs(new):
        _find_dtypes(graph, change)
    for graph in _graphs(new):
        _tensors(graph, change)
    renamed = [*change.dtypes.items(), *change.devices.items()]
    if not change.touched and all(old == there for old, there in renamed):
        return None
    for graph in _graphs(new):
        _rewrite(graph, change)
        if graph is not new:  # which does not run itself
            graph.recompile()
    for leaf in new.meta.get("inc", {}).get("inputs", {}).get("leaves", ()):
        kind, _, layout = leaf.get("form", "").partition(" ")
        dtype = change.dtypes.get(getattr(torch, kind, None))  # type: ignore[arg-type]
        if dtype is not None and layout:
            leaf["form"] = f"{dtype} {layout}".replace("torch.", "")
    return new


def _graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph and the bodies of its branches."""
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule)]


# ------------------------------------------------------------------------------------------------- what is what
def _fixed(gm: fx.GraphModule) -> set[fx.Node]:
    """Scales and zero points, and what they are computed from."""
    todo = []
    for node in gm.graph.nodes:
        if is_quantize(node) or is_dequantize(node) or is_fake_quantize(node):
            todo += [n for n in (argument(node, 1), argument(node, 2)) if isinstance(n, fx.Node)]
    found: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in found and node.op != "placeholder":
            found.add(node)
            todo += [] if is_choose_qparams(node) else node.all_input_nodes
    return found


def _kinds(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """What each float value is computed from; scales are left out."""
    fixed = _fixed(gm)
    kinds: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node in fixed or node.op == "output" or not _floats(node):
            continue
        read = {kinds[i] for i in node.all_input_nodes if i in kinds}
        if node.op == "get_attr":
            kinds[node] = _MODEL if isinstance(get_attr(gm, str(node.target)), nn.Parameter) else _CONSTANT
        elif node.op == "placeholder" or _MODEL in read or is_dequantize(node) or is_fake_quantize(node):
            kinds[node] = _MODEL
        else:
            kinds[node] = _CONSTANT if read == {_CONSTANT} else _WHOLE
    reads: dict[str, list[fx.Node]] = {}
    for node in kinds:
        if node.op == "get_attr":
            reads.setdefault(str(node.target), []).append(node)
    for nodes in reads.values():  # a buffer that only values of the model meet, a bias say, is one of them
        users = [u for n in nodes for u in n.users if u.op != "output"]
        if all(kinds.get(u) == _MODEL for u in users):
            kinds.update(dict.fromkeys(nodes, _MODEL))
    return kinds


def _floats(node: fx.Node) -> bool:
    """Whether a node has values of the model's kind; float8 are codes."""
    values = [v for v in pytree.tree_leaves(val(node)) if isinstance(v, Tensor)]
    return any(v.is_floating_point() and v.dtype.itemsize > 1 for v in values)


def _find_dtypes(gm: fx.GraphModule, change: _Change) -> None:
    """The model's own dtypes are those of its parameters, of its inputs and of its weights once dequantized."""
    fixed = _fixed(gm)
    own: set[torch.dtype] = set()
    for node in gm.graph.nodes:
        if node in fixed or not is_float(node):
            continue
        parameter = node.op == "get_attr" and isinstance(get_attr(gm, str(node.target)), nn.Parameter)
        if parameter or node.op == "placeholder" or is_dequantize(node):
            own.add(val(node).dtype)
    tensors = [t for n in gm.graph.find_nodes(op="get_attr") if isinstance(t := get_attr(gm, str(n.target)), Tensor)]
    devices = {t.device for t in tensors} or {val(n).device for n in gm.graph.nodes if isinstance(val(n), Tensor)}
    for device in devices:
        there = change.once(torch.empty(1, dtype=torch.int32, device=device)).device
        change.devices[device] = there
        for dtype in own:
            change.dtypes[dtype] = change.once(torch.empty(1, dtype=dtype, device=device)).dtype


# --------------------------------------------------------------------------------------------------- the changes
def _tensors(gm: fx.GraphModule, change: _Change) -> None:
    kinds = _kinds(gm)
    reads = {str(n.target): kinds.get(n) == _MODEL for n in gm.graph.find_nodes(op="get_attr")}
    for path, casts in reads.items():
        old = get_attr(gm, path)
        if not isinstance(old, Tensor):
            continue
        new = change.once.of(old, keep_dtype=not casts)
        change.touched |= new is not old
        prefix, _, leaf = path.rpartition(".")
        owner = gm.get_submodule(prefix)
        table: dict[str, Any] = owner._parameters if isinstance(old, nn.Parameter) else owner._buffers
        table[leaf] = new


def _rewrite(gm: fx.GraphModule, change: _Change) -> None:
    """Constants, casts and fake values, in graph order: each node finds those of its inputs done."""
    kinds = _kinds(gm)
    casting = any(new != old for old, new in change.dtypes.items())
    for node in list(gm.graph.nodes):
        cast = casting and kinds.get(node) == _MODEL
        if node.op == "call_function":
            node.args = pytree.tree_map(lambda x, c=cast: change.constant(x, c), tuple(node.args))
            node.kwargs = pytree.tree_map(lambda x, c=cast: change.constant(x, c), dict(node.kwargs))
            if cast and not is_dequantize(node):
                _cast_inputs(gm, node, kinds, change)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(lambda x, c=cast: change.value(x, c), val(node))


def _cast_inputs(gm: fx.GraphModule, node: fx.Node, kinds: dict[fx.Node, str], change: _Change) -> None:
    for source in node.all_input_nodes:
        if kinds.get(source) in (_WHOLE, _CONSTANT) and is_float(source) and val(source).dtype in change.dtypes:
            dtype = change.dtypes[val(source).dtype]
            made = insert_call(gm, aten._to_copy.default, (source,), {"dtype": dtype}, before=node, like=source)
            node.replace_input_with(source, made)
            kinds[made] = _MODEL
