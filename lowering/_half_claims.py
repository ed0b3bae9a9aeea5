"""Claims on layers in half precision.

    conv | linear [-> + other] [-> activation]      becomes one HalfLayer

Only weights that nobody else reads are packed: a table that is an output head too would be kept twice. Of a layer whose
weight others hold, which are lowered by themselves, the annotation `shared` says it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inc_graph.graph import get_tensor, peek_meta, replace_uses, unique_name, val
from inc_graph.lowering import _half
from inc_graph.lowering._context import OneDnnContext, only_user, typical_shape
from inc_graph.lowering._fusion import CONV, LINEAR, activation_of, dims_of
from inc_graph.lowering._half import HalfLayer, HalfWeight
from inc_graph.lowering._onednn import PLAIN, Activation
from inc_graph.lowering._packed import Geometry
from inc_graph.lowering.base import Claim
from inc_graph.oppattern import argument
from inc_graph.pattern import Match, P

__all__ = ["HALF_LAYERS"]

aten = torch.ops.aten

_MOST_LINEAR = 1.25
_MOST_CONV = 2.0
_LITTLE = 1 << 14
"""How many times the bytes of a weight oneDNN's layout of it may take. It pads to 16 or 64 channels: the head of a
classifier would take eight times the bytes of its float32 weight. Convolutions lose more without it: not above float32.
So many bytes more are always taken.
"""


def _check(c: OneDnnContext, found: Match) -> str | None:
    node = found.root
    if peek_meta(node).get("shared"):
        return ""
    x, w, bias = (argument(node, i) for i in range(3))
    half = getattr(val(node), "dtype", None)
    if half not in (torch.bfloat16, torch.float16) or not _half.has_kernels(half):
        return ""
    if not all(isinstance(n, fx.Node) and val(n).dtype == half for n in (x, w)):
        return ""
    constants = [n for n in (w, bias) if n is not None]
    if any(not isinstance(n, fx.Node) or n.op != "get_attr" or "." in str(n.target) for n in constants):
        return ""
    weight = get_tensor(c.gm, w)
    if weight.device.type != "cpu" or not weight.numel() or _read_elsewhere(c.gm, str(w.target)):
        return ""
    if node.target not in LINEAR and (val(x).ndim != weight.ndim or _geometry(node) is None):
        return ""
    size = _packed(c, node).nbytes()
    times = size / weight.nbytes
    if times > (_MOST_LINEAR if node.target in LINEAR else _MOST_CONV) and size - weight.nbytes > _LITTLE:
        return f"oneDNN's layout of its weight takes {times:.1f} times the bytes, so torch's own operator computes it"
    return None


def _packed(c: OneDnnContext, node: fx.Node) -> HalfWeight:
    """The weight of a layer in oneDNN's layout."""
    x, w = (argument(node, i) for i in range(2))
    geometry = _geometry(node)
    key = ("half", str(w.target), geometry)
    if key not in c.weights:
        packed = HalfWeight(get_tensor(c.gm, w).detach(), typical_shape(x), geometry)
        c.weights[key] = packed  # type: ignore[assignment]
    return c.weights[key]  # type: ignore[return-value]


def _read_elsewhere(gm: fx.GraphModule, name: str) -> bool:
    """Whether something reads a weight that is neither a linear layer nor a convolution."""
    readers = [u for n in gm.graph.find_nodes(op="get_attr") if n.target == name for u in n.users]
    return any(u.target not in (*LINEAR, *CONV) or argument(u, 1).target != name for u in readers)


def _geometry(node: fx.Node) -> Geometry | None:
    """Stride, padding, dilation and groups; None where the padding differs from side to side."""
    if node.target in LINEAR:
        return None
    kernel = val(node.args[1]).shape[2:]  # type: ignore[arg-type]

    def numbers(value: Any) -> tuple[int, ...]:
        items = tuple(value) if isinstance(value, list | tuple) else (value,)
        return items * len(kernel) if len(items) == 1 else items

    stride, dilation, padding = numbers(argument(node, 3)), numbers(argument(node, 5)), argument(node, 4)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = [t // 2 for t in total]
    return Geometry(stride, numbers(0 if padding == "valid" else padding), dilation, argument(node, 6))


def _rewrite(c: OneDnnContext, found: Match) -> str:
    node = found.root
    x, w, bias = (argument(node, i) for i in range(3))
    geometry = _geometry(node)
    end, other, activation = _behind(c, node)
    weight, name = _packed(c, node), str(w.target)
    new = (name, geometry) not in c.counted
    c.counted.add((name, geometry))
    c.packed.setdefault(name, weight.values)
    values = None if bias is None else get_tensor(c.gm, bias).detach().contiguous()
    layer = HalfLayer(weight, values, geometry, activation, counted=new)
    attribute = unique_name(c.gm, f"layer_{node.name}")
    setattr(c.gm, attribute, layer)
    with c.gm.graph.inserting_before(end):
        read = c.gm.graph.create_node("get_attr", attribute, (), {})
        args = (x, read) if other is None else (x, other, read)
        target = _half.half_layer if other is None else _half.half_layer_add
        call = c.gm.graph.create_node("call_function", target, args, {})
    read.meta["val"] = None
    call.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    call.meta["val"] = layer.empty_out(val(x))
    c.promised[call] = val(end)
    fused = node
    while fused is not end:
        fused = next(iter(fused.users))
        c.absorbed[fused.name] = node.name
    replace_uses(end, call)
    return f"{str(layer.weight.dtype).removeprefix('torch.')} {'linear' if geometry is None else 'convolution'}"


def _behind(c: OneDnnContext, node: fx.Node) -> tuple[fx.Node, fx.Node | None, Activation]:
    """(the last operator that fuses with a layer, the other operand of a sum, the activation function)."""
    user = only_user(node)
    if user is None or getattr(val(user), "dtype", None) != val(node).dtype:
        return node, None, PLAIN
    if (activation := activation_of(c, user, dims_of(node))) is not None:
        return user, None, activation
    if user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return node, None, PLAIN
    other: Any = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node or not _alike(other, node):
        return node, None, PLAIN
    clip = only_user(user)
    if dims_of(node) and clip is not None and clip.target is aten.relu.default:
        return clip, other, Activation("relu")
    return user, other, PLAIN


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = val(a), val(b)
    return isinstance(x, torch.Tensor) and x.dtype == y.dtype and list(map(str, x.shape)) == list(map(str, y.shape))


HALF_LAYERS = Claim("half layer", P((*LINEAR, *CONV)), _rewrite, _check)
