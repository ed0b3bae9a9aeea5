"""What fuses behind a layer: an addition, an activation function, the quantization of the result.

    layer -> + other -> relu -> quantize           "sum": both sides codes, the result goes into the memory of `other`
    linear -> + other -> relu [-> quantize]        "add": `other` is float
    layer -> activation [-> quantize, or a cast to bfloat16]

A "sum" may only write to memory that nobody reads any more; `owned` decides that, and a copy is made where it says no.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from inc_graph.graph import val
from inc_graph.lowering import _onednn
from inc_graph.lowering._codes import codes_to_unsigned, max_pool, spread
from inc_graph.lowering._context import OneDnnContext, QParams, only_user
from inc_graph.lowering._onednn import ACTIVATIONS, FORMS, PLAIN, Activation, Other, Output
from inc_graph.oppattern import argument, pattern_of
from inc_graph.ops import is_dequantize, is_quantize

__all__ = ["CONV", "LINEAR", "TRANSPOSED", "Tail", "owned", "tail_of"]

aten = torch.ops.aten

LINEAR = (aten.linear.default,)
CONV = tuple(op for p in (aten.conv1d, aten.conv2d, aten.conv3d) for op in (p.default, p.padding))
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)

Bounds = tuple[float | None, float | None]


@dataclass
class Tail:
    """What follows a layer and fuses with it."""

    end: fx.Node  # its value is the layer's result
    place: fx.Node  # the fused layer stands before this node
    activation: Activation = PLAIN
    output: Output = field(default_factory=Output)
    quantize: fx.Node | None = None
    operand: fx.Node | None = None  # of an addition: a float value, or codes for the form "sum"
    other: Other | None = None

    @property
    def result(self) -> fx.Node:
        """The node that the fused layer takes the place of."""
        return self.quantize or self.end


def tail_of(c: OneDnnContext, layer: fx.Node) -> Tail:
    """Everything behind `layer` that its kernel can do as well."""
    tail = Tail(layer, layer, output=Output(val(layer).dtype))
    user = only_user(layer)
    if user is not None and user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
        _take_add(c, tail, user)
    elif user is not None and (activation := activation_of(c, user, dims_of(layer))) is not None:
        tail.end, tail.activation = user, activation
    if (quantize := _full_quantize(c, tail.end)) is not None:
        node, p = quantize
        tail.quantize, tail.output = node, Output(p.dtype, p.scale, p.zero_point)
    elif (cast := _half_cast(tail)) is not None:
        tail.end, tail.output = cast, Output(torch.bfloat16)
    elif tail.output.dtype not in (torch.float32, torch.bfloat16):
        tail.output = Output()  # and a cast behind it
    return tail


def _half_cast(tail: Tail) -> fx.Node | None:
    """The cast of a float32 result to bfloat16, which the kernel can write as well."""
    user = only_user(tail.end)
    if user is None or user.target is not aten._to_copy.default or set(user.kwargs) != {"dtype"}:
        return None
    plain = tail.other is None and val(tail.end).dtype == torch.float32 and val(user).dtype == torch.bfloat16
    return user if plain else None


def dims_of(layer: fx.Node) -> int:
    """Dimensions of space of a convolution, 0 for a linear layer."""
    return 0 if layer.target in LINEAR else val(layer).ndim - 2


def _full_quantize(c: OneDnnContext, node: fx.Node) -> tuple[fx.Node, QParams] | None:
    user = only_user(node)
    if user is not None and is_quantize(user) and (p := c.qparams(user)) is not None and p.full:
        return user, p
    return None


def activation_of(c: OneDnnContext, node: fx.Node, dims: int) -> Activation | None:
    """The fused form of an activation function, None if the kernel has none or the node is something else."""
    pattern = pattern_of(node)
    if pattern is None or pattern.role != "activation":
        return None
    if (bounds := _bounds(node)) is not None:
        found = _clip(bounds)
        if (quantize := _full_quantize(c, node)) is not None:
            found = _clip_codes(bounds, quantize[1]) or found
    else:
        found = _smooth(node)
    return found if found is not None and found.name in ACTIVATIONS[dims] else None


def _smooth(node: fx.Node) -> Activation | None:
    t = node.target
    if t is aten.hardswish.default:
        return Activation("hardswish")
    if t is aten.silu.default:
        return Activation("swish")
    if t is aten.gelu.default:
        return Activation("gelu", (), str(argument(node, 1)))
    if t is aten.tanh.default:
        return Activation("tanh")
    if t is aten.leaky_relu.default:
        return Activation("leaky_relu", (float(argument(node, 1)),))
    return None


def _clip(bounds: Bounds) -> Activation | None:
    low, high = bounds
    if low is not None and high is not None:
        return Activation("hardtanh", (low, high))
    return Activation("relu") if low == 0 and high is None else None


def _clip_codes(bounds: Bounds, p: QParams) -> Activation | None:
    """Clipping before a quantization, simpler: a bound at or beyond the last code is what saturation does anyway."""
    info = torch.iinfo(p.dtype)
    low, high = bounds
    if high is not None and p.code(high) <= info.max - 0.5:
        return None
    if low is None or p.code(low) < info.min + 0.5:
        return PLAIN
    return Activation("relu") if low == 0 else None


def _bounds(node: fx.Node) -> Bounds | None:
    """(low, high) of a function that only clips, None if it is another."""
    if node.target is aten.relu.default:
        return 0.0, None
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        low, high = argument(node, 1), argument(node, 2)
        if all(v is None or isinstance(v, int | float) for v in (low, high)):
            return None if low is None else float(low), None if high is None else float(high)
    return None


# --------------------------------------------------------------------------------------------------------- addition
def _take_add(c: OneDnnContext, tail: Tail, add: fx.Node) -> None:
    """Fuse `layer + other` if the kernel can."""
    layer = tail.end
    operand: Any = add.args[1] if add.args[0] is layer else add.args[0]
    if not isinstance(operand, fx.Node) or operand is layer or not _same_shape(operand, layer):
        return
    if _take_sum(c, tail, add, operand) or layer.target not in LINEAR:
        return
    if val(operand).dtype == torch.float32 == val(layer).dtype:
        tail.end, tail.activation = _with_relu(add)
        tail.place, tail.operand, tail.other = add, operand, Other("add")


def _take_sum(c: OneDnnContext, tail: Tail, add: fx.Node, operand: fx.Node) -> bool:
    if "sum" not in FORMS[dims_of(tail.end)]:
        return False
    if not is_dequantize(operand) or (p := c.qparams(operand)) is None:
        return False
    end, activation = add, PLAIN
    clip = only_user(add)
    if clip is not None and (bounds := _bounds(clip)) is not None:
        quantize = _full_quantize(c, clip)
        if quantize is None or (found := _clip_codes(bounds, quantize[1])) is None:
            return False
        end, activation = clip, found
    else:
        quantize = _full_quantize(c, add)
    if quantize is None or quantize[1].dtype != p.dtype:
        return False
    tail.end, tail.activation, tail.place = end, activation, add
    tail.operand, tail.other = operand.args[0], Other("sum", p.scale, p.zero_point)  # type: ignore[assignment]
    return True


def _with_relu(add: fx.Node) -> tuple[fx.Node, Activation]:
    user = only_user(add)
    return (user, Activation("relu")) if user is not None and user.target is aten.relu.default else (add, PLAIN)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = val(a), val(b)
    return isinstance(x, torch.Tensor) and list(map(str, x.shape)) == list(map(str, y.shape))  # str: no guards


# -------------------------------------------------------------------------------------------------------- ownership
_NEW = (_onednn.int8_layer, _onednn.int8_layer_add, codes_to_unsigned, max_pool, spread)


def owned(codes: fx.Node, add: fx.Node) -> bool:
    """True if `add` may write into the memory of `codes`: made by the graph, and read by nobody after `add`.

    The result of another sum qualifies: nobody reads its memory by another name after it, or that sum would have been
    given a copy.
    """
    fresh = is_quantize(codes) or codes.target is _onednn.int8_layer_sum or _is_new(codes)
    return fresh and all(reader is add or _runs_at(reader) < add for reader in _readers(codes))


def _readers(codes: fx.Node) -> list[fx.Node]:
    """Nodes that read the memory of `codes`, also through views of it and through values that are not computed yet."""
    found: dict[fx.Node, None] = {}
    todo = list(codes.users)
    while todo:
        node = todo.pop()
        if node in found:
            continue
        if not is_dequantize(node):  # a kernel that takes the codes themselves reads them where it stands
            found[node] = None
        if is_dequantize(node) or not (node.op == "output" or is_quantize(node) or _is_new(node)):
            todo += node.users
    return list(found)


def _is_new(node: fx.Node) -> bool:
    """True if the result stands in memory of its own."""
    if node.target in _NEW:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target is aten.pad.default:  # a pad may be absorbed: its reader then reads what it reads
        return False
    return all(r.alias_info is None for r in schema.returns)


def _runs_at(reader: fx.Node) -> fx.Node:
    """Where a reader will stand once it is fused: a layer whose only user is an add moves there."""
    user = only_user(reader)
    if user is not None and user.target is aten.add.Tensor and reader.target in (*LINEAR, *CONV, *TRANSPOSED):
        return user
    return reader
