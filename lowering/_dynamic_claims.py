"""Claims on linear layers whose inputs are quantized as they come.

    choose_qparams(x) -> quantize -> dequantize , dequantize(w) -> linear [+ other] [-> activation]
                                                      [-> choose_qparams ... of the next such layer, per token]

become one `dynamic_codes` for all layers that read `x`, and one `DynamicLayer` each.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from inc_graph.graph import insert_call, replace_uses, unique_name, val
from inc_graph.lowering._context import CODES, OneDnnContext, Weight, bias_of, only_user, typical_shape, weight_of
from inc_graph.lowering._dynamic import (
    DynamicLayer,
    dynamic_codes,
    dynamic_layer,
    dynamic_layer_add,
    dynamic_layer_codes,
)
from inc_graph.lowering._packed import PackedWeight
from inc_graph.lowering.base import Claim
from inc_graph.oppattern import argument
from inc_graph.ops import is_choose_qparams, is_dequantize, is_quantize
from inc_graph.pattern import Match, P
from inc_graph.qtypes import get_qtype

__all__ = ["DYNAMIC_LINEAR", "Chosen", "chosen"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Chosen:
    """What a quantize node with scales of its own does."""

    source: fx.Node
    qtype: str
    scheme: str
    per_row: bool

    @property
    def zero_point(self) -> int | None:
        """That of all codes, as they are in memory; None if each row has its own."""
        qt = get_qtype(self.qtype)
        if self.scheme == "asymmetric":
            return None
        return (int(qt.qmin) + int(qt.qmax) + 1) // 2 + (128 if qt.signed else 0)

    def __str__(self) -> str:
        return f"dynamic {self.qtype}, {'per token' if self.per_row else 'per tensor'}"


def chosen(values: Any) -> Chosen | str | None:
    """The dynamic quantization in front of a dequantize node; the reason why no kernel takes it; None if it is none."""
    if not (isinstance(values, fx.Node) and is_dequantize(values) and is_quantize(values.args[0])):
        return None
    x, scale, zero, block, qtype = (argument(values.args[0], i) for i in range(5))
    choose = scale.args[0] if scale.target is operator.getitem else None
    if not is_choose_qparams(choose):
        return None
    source, own, name, scheme = (argument(choose, i) for i in range(4))
    if source is not x or list(own) != list(block) or name != qtype or scale.args[1] != 0:
        return "its scale is not that of its input"
    if zero is not None and (zero.target is not operator.getitem or zero.args != (choose, 1)):
        return "its zero point is not that of its input"
    if qtype not in CODES:
        return f"its input is {qtype}; the kernel takes 8 bits"
    rows = [1] * (len(block) - 1)
    if list(block) not in ([*rows, -1], [-1] * len(block)):
        return f"its input is in blocks {list(block)}; the kernel takes one scale a row, or one"
    if val(x).device.type != "cpu":
        return f"its input is on {val(x).device}; the kernel runs on the CPU"
    return Chosen(x, str(qtype), str(scheme), list(block) == [*rows, -1])


@dataclass(frozen=True)
class _Plan:
    x: Chosen
    weight: Weight
    bias: torch.Tensor | None


def _read(c: OneDnnContext, node: fx.Node) -> _Plan | str | None:
    x = chosen(argument(node, 0))
    if x is None or isinstance(x, str):
        return x
    weight = weight_of(c, node, 0)
    if isinstance(weight, str):
        return weight
    bias = bias_of(c, node)
    return bias if isinstance(bias, str) else _Plan(x, weight, bias)


def _check(c: OneDnnContext, found: Match) -> str | None:
    plan = _read(c, found.root)
    return "" if plan is None else plan if isinstance(plan, str) else None


# ---------------------------------------------------------------------------------------------------------- what fuses
@dataclass
class _Tail:
    """`end` gives the layer's result; `place` is where it runs."""

    end: fx.Node
    place: fx.Node
    activation: str = "none"
    other: fx.Node | None = None
    codes: Chosen | None = None


def _tail(layer: fx.Node) -> _Tail:
    tail = _Tail(layer, layer)
    user = only_user(layer)
    if user is not None and user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
        other: Any = user.args[1] if user.args[0] is layer else user.args[0]
        if isinstance(other, fx.Node) and other is not layer and _alike(other, layer):
            tail.end = tail.place = user
            tail.other = other
            user = only_user(user)
    if user is not None and (name := _activation(user)) is not None:
        tail.end, tail.activation = user, name
    if tail.other is None and val(tail.end).dtype == torch.float32:
        tail.codes = _next(tail.end)
    return tail


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = val(a), val(b)
    same = isinstance(x, torch.Tensor) and x.dtype == y.dtype and x.device == y.device
    return same and list(map(str, x.shape)) == list(map(str, y.shape))  # text: no guards


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.relu.default:
        return "relu"
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu tanh"}.get(str(argument(node, 1)))
    return None


def _next(end: fx.Node) -> Chosen | None:
    """The quantization by row of `end`, if nothing else reads it, and only layers read that."""
    quantizers = [u for u in end.users if is_quantize(u)]
    if len(end.users) != 2 or len(quantizers) != 1 or not any(map(is_choose_qparams, end.users)):
        return None
    found = {chosen(u) if is_dequantize(u) else None for u in quantizers[0].users}
    only = found.pop() if len(found) == 1 else None
    return only if isinstance(only, Chosen) and only.per_row else None


# ----------------------------------------------------------------------------------------------------------- rewriting
def _rewrite(c: OneDnnContext, found: Match) -> str:
    node, gm = found.root, c.gm
    plan = _read(c, node)
    assert isinstance(plan, _Plan)
    quantize: Any = argument(node, 0).args[0]  # type: ignore[union-attr]
    tail = _tail(node)
    weight, sums, new = _packed(c, plan)
    codes = None if tail.codes is None else (tail.codes.qtype, tail.codes.scheme)
    layer = DynamicLayer(
        weight, sums, plan.bias, plan.x.zero_point, tail.activation, val(node).dtype, codes, counted=new
    )
    pair = _inputs(c, quantize, plan.x)
    name = unique_name(gm, f"layer_{node.name}")
    setattr(gm, name, layer)
    c.sources[name] = plan.weight.attr
    with gm.graph.inserting_before(tail.place):
        read = gm.graph.create_node("get_attr", name, (), {})
        args = (*pair, read) if tail.other is None else (*pair, tail.other, read)
        target = dynamic_layer_codes if codes else dynamic_layer if tail.other is None else dynamic_layer_add
        call = gm.graph.create_node("call_function", target, args, {})
    read.meta["val"] = None
    call.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    call.meta["val"] = layer.empty_out(*(val(n) for n in pair))
    if tail.codes is not None:
        (again,) = (u for u in tail.end.users if is_quantize(u))
        _remember(c, again, call)
    else:
        replace_uses(tail.end, call)
    c.packed.setdefault(plan.weight.attr, lambda: weight.codes())  # a function is not copied, what is bound to one is
    if tail.other is not None:
        c.absorbed[tail.place.name] = node.name
    return f"int8 linear, {plan.x}"


def _inputs(c: OneDnnContext, quantize: fx.Node, x: Chosen) -> tuple[fx.Node, fx.Node]:
    """Codes and parameters of what `quantize` quantizes, made once."""
    known: dict[fx.Node, tuple[fx.Node, fx.Node]] = c.dynamic
    if quantize not in known:
        args = (x.source, x.qtype, x.scheme, x.per_row)
        with c.gm.graph.inserting_before(quantize):
            call = c.gm.graph.create_node("call_function", dynamic_codes, args, {})
        call.meta = {k: v for k, v in quantize.meta.items() if k in ("nn_module_stack", "stack_trace")}
        call.meta["val"] = torch.ops.inc_onednn.dynamic_codes(val(x.source), *args[1:])
        _remember(c, quantize, call)
    return known[quantize]


def _remember(c: OneDnnContext, quantize: fx.Node, call: fx.Node) -> None:
    first = insert_call(c.gm, operator.getitem, (call, 0), after=call, like=quantize)
    second = insert_call(c.gm, operator.getitem, (call, 1), after=first, like=quantize)
    c.dynamic[quantize] = first, second


def _packed(c: OneDnnContext, plan: _Plan) -> tuple[PackedWeight, torch.Tensor, bool]:
    """The plan's weight, the sums of its rows, and whether no layer before has packed it."""
    weight = plan.weight
    key = (weight.attr, weight.scale_attr, True, ())  # as static layers have it: they can share it
    new = key not in c.weights
    if new:
        c.weights[key] = PackedWeight(weight.codes, weight.scale, typical_shape(plan.x.source), None, True)
    sums = weight.codes.sum(1, dtype=torch.int32).float() * weight.scale
    return c.weights[key], sums, new


DYNAMIC_LINEAR = Claim("dynamic int8 linear", P(aten.linear.default), _rewrite, _check)
