"""Linear layers, convolutions and their transposes as int8 layers: reading one from the graph, and putting it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from inc_graph.graph import insert_call, insert_get_attr, replace_uses, set_tensor, unique_name, val
from inc_graph.lowering import _onednn
from inc_graph.lowering._codes import codes_to_unsigned, spread
from inc_graph.lowering._context import OneDnnContext, QParams, Weight, bias_of, typical_shape, weight_of
from inc_graph.lowering._dynamic_claims import chosen
from inc_graph.lowering._forms import Form, Sides, can_absorb, form_of, too_many_groups
from inc_graph.lowering._fusion import LINEAR, TRANSPOSED, owned, tail_of
from inc_graph.lowering._onednn import Int8Layer
from inc_graph.lowering._packed import Geometry, PackedWeight
from inc_graph.oppattern import argument
from inc_graph.ops import is_dequantize
from inc_graph.pattern import Match

__all__ = ["check_layer", "check_signed", "rewrite_layer", "rewrite_signed"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Plan:
    """A layer as the kernel will get it. `restore` makes the graph's weight of the layer's codes again.

    `form`: how the layer's codes were made of the weight; equal for layers that can share them.
    """

    x: fx.Node
    p: QParams
    weight: Weight
    bias: torch.Tensor | None
    form: tuple[Any, ...] = ()
    restore: Callable[[torch.Tensor], torch.Tensor] = lambda w: w


# ---------------------------------------------------------------------------------------------------------- reading
def check_layer(c: OneDnnContext, found: Match) -> str | None:
    """Why the matched operator is no int8 layer; None if it is one."""
    node = found.root
    plan = _read(c, node)
    if isinstance(plan, str) or node.target in LINEAR:
        return plan if isinstance(plan, str) else None
    kernel = plan.weight.codes.shape[2:]
    if val(plan.x).ndim != len(kernel) + 2:
        return f"unbatched input of rank {val(plan.x).ndim}"
    if node.target in TRANSPOSED:
        return "grouped transposed convolution" if argument(node, 6) != 1 else None
    if too_many_groups(plan.weight.codes, argument(node, 6)):
        kind = "a depthwise convolution of a kind that oneDNN's kernels get wrong"
        return f"{kind}: its groups cannot be merged, or only into a weight larger than in float32"
    return None


def _read(c: OneDnnContext, node: fx.Node) -> _Plan | str:
    x: Any = argument(node, 0)
    w: Any = argument(node, 1)
    if not is_dequantize(x):
        return "its input is not quantized; the kernel takes no float input" if is_dequantize(w) else ""
    if chosen(x) is not None:  # of linear layers the claim on dynamic ones has said why not
        return "" if node.target in LINEAR else "its input is quantized at run time; the kernel takes a static scale"
    if (p := c.qparams(x)) is None:
        return f"its input is {x.args[4]} in blocks {list(x.args[3])}; the kernel takes one static 8-bit scale"
    weight = weight_of(c, node, 1 if node.target in TRANSPOSED else 0)
    if isinstance(weight, str):
        return weight
    bias = bias_of(c, node)
    return bias if isinstance(bias, str) else _Plan(x.args[0], p, weight, bias)


def _numbers(value: Any, dims: int) -> tuple[int, ...]:
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    return items * dims if len(items) == 1 else items


# --------------------------------------------------------------------------------------------------------- rewriting
def rewrite_layer(c: OneDnnContext, found: Match) -> None:
    """Put an int8 layer in the place of the matched operator and of what fuses behind it."""
    node = found.root
    plan = _read(c, node)
    assert isinstance(plan, _Plan)
    if node.target in LINEAR:
        _emit(c, node, plan, None)
        return
    if plan.p.dtype != torch.uint8:
        x = insert_call(c.gm, codes_to_unsigned, (plan.x,), before=node)
        plan = replace(plan, x=x, p=QParams(plan.p.scale, plan.p.zero_point + 128, "uint8"))
    _emit(c, node, *(_spread_out if node.target in TRANSPOSED else _plain)(c, node, plan))


def _plain(c: OneDnnContext, node: fx.Node, plan: _Plan) -> tuple[_Plan, Geometry]:
    kernel = tuple(plan.weight.codes.shape[2:])
    dims = len(kernel)
    stride, dilation = _numbers(argument(node, 3), dims), _numbers(argument(node, 5), dims)
    own: Any = argument(node, 4)
    if own == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides: Sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((q, q) for q in _numbers(0 if own == "valid" else own, dims))
    x, sides = _absorb_pad(plan.x, plan.p, sides, dilation)
    return _formed(c, node, replace(plan, x=x), form_of(plan.weight.codes, stride, sides, dilation, argument(node, 6)))


def _formed(c: OneDnnContext, node: fx.Node, plan: _Plan, form: Form) -> tuple[_Plan, Geometry]:
    x, before = plan.x, plan.restore
    if form.pad:
        x = insert_call(c.gm, aten.constant_pad_nd.default, (x, form.pad, plan.p.zero_point), before=node)
    weight, inner = replace(plan.weight, codes=form.codes), form.restore
    plan = replace(plan, form=(node.target in TRANSPOSED, *form.key))
    return replace(plan, x=x, weight=weight, restore=lambda w: before(inner(w))), form.geometry


def _absorb_pad(x: fx.Node, p: QParams, sides: Sides, dilation: tuple[int, ...]) -> tuple[fx.Node, Sides]:
    """The source of a `pad` with zero and the padding of both together, if the kernel can make up for it."""
    if x.target is not aten.pad.default or argument(x, 2) != "constant" or argument(x, 3) != p.zero_point:
        return x, sides
    widths = list(argument(x, 1))
    if len(widths) > 2 * len(sides) or any(not isinstance(w, int) or w < 0 for w in widths):
        return x, sides
    widths += [0] * (2 * len(sides) - len(widths))
    more = list(zip(widths[::2], widths[1::2], strict=True))[::-1]  # `pad` begins with the last dimension
    wide: Sides = tuple((q + a, r + b) for (q, r), (a, b) in zip(sides, more, strict=True))
    return (x.args[0], wide) if can_absorb(wide, dilation) else (x, sides)  # type: ignore[return-value]


def _spread_out(c: OneDnnContext, node: fx.Node, plan: _Plan) -> tuple[_Plan, Geometry]:
    """A transposed convolution is a convolution of the spread-out input with the mirrored kernel."""
    kernel = tuple(plan.weight.codes.shape[2:])
    dims = len(kernel)
    stride, padding, extra, dilation = (_numbers(argument(node, i), dims) for i in (3, 4, 5, 7))
    before = [d * (k - 1) - q for d, k, q in zip(dilation, kernel, padding, strict=True)]
    after = [b + e for b, e in zip(before, extra, strict=True)]
    x = insert_call(c.gm, spread, (plan.x, list(stride), before, after, plan.p.zero_point), before=node)
    space = list(range(2, dims + 2))
    codes = plan.weight.codes.transpose(0, 1).flip(space).contiguous()
    form = form_of(codes, (1,) * dims, ((0, 0),) * dims, dilation, 1)
    return _formed(c, node, replace(plan, x=x, restore=lambda w: w.flip(space).transpose(0, 1)), form)


def _emit(c: OneDnnContext, node: fx.Node, plan: _Plan, geometry: Geometry | None) -> None:
    """Build the layer with what fuses behind `node` and put its call in their place."""
    gm, tail = c.gm, tail_of(c, node)
    weight, new = _packed(c, plan, geometry)
    layer = Int8Layer(
        weight,
        plan.bias,
        plan.p.scale,
        plan.p.zero_point,
        geometry,
        tail.activation,
        tail.output,
        tail.other,
        counted=new,
    )
    form = tail.other.form if tail.other else ""
    operand, place = tail.operand, tail.place
    if form == "sum" and operand is not None and not owned(operand, place):
        operand = insert_call(gm, aten.clone.default, (operand,), before=place)
    name = unique_name(gm, f"layer_{node.name}")
    setattr(gm, name, layer)
    target = {"": _onednn.int8_layer, "add": _onednn.int8_layer_add, "sum": _onednn.int8_layer_sum}[form]
    with gm.graph.inserting_before(place):
        read = gm.graph.create_node("get_attr", name, (), {})
        args = (plan.x, read) if operand is None else (plan.x, operand, read)
        call = gm.graph.create_node("call_function", target, args, {})
    read.meta["val"] = None
    call.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    call.meta["val"] = layer.empty_out(val(plan.x))
    result = tail.result
    c.promised[call] = val(result)
    if (dtype := val(result).dtype) != call.meta["val"].dtype:
        call = insert_call(gm, aten._to_copy.default, (call,), {"dtype": dtype}, after=call)
    replace_uses(result, call)
    restore = plan.restore  # not the plan: its codes must not live on beside the packed ones
    c.packed.setdefault(plan.weight.attr, lambda: restore(weight.codes()).contiguous())
    if tail.other is not None:
        c.absorbed[place.name] = node.name


def _packed(c: OneDnnContext, plan: _Plan, geometry: Geometry | None) -> tuple[PackedWeight, bool]:
    """The plan's weight, and whether no layer before has packed it."""
    weight = plan.weight
    key = (weight.attr, weight.scale_attr, geometry is None, plan.form)
    if (known := c.weights.get(key)) is not None:
        return known, False
    shape = typical_shape(plan.x)
    c.weights[key] = new = PackedWeight(weight.codes, weight.scale, shape, geometry, weight.asymmetric)
    return new, True


# --------------------------------------------------------------------------------------------- int8 codes as uint8
def check_signed(c: OneDnnContext, found: Match) -> str | None:
    """ "" unless the match is an int8 quantize whose codes nobody sees but its own dequantize nodes."""
    p = c.qparams(found.root)
    if p is None or p.qtype != "int8":
        return ""
    return None if all(is_dequantize(u) and c.qparams(u) == p for u in found.root.users) else ""


def rewrite_signed(c: OneDnnContext, found: Match) -> None:
    """int8 codes with zero point z are uint8 codes with zero point z + 128, which is what convolutions take."""
    node, p = found.root, c.qparams(found.root)
    assert p is not None
    zero = torch.full([1] * val(node).ndim, p.zero_point + 128, dtype=torch.int32)
    read = insert_get_attr(c.gm, node, set_tensor(c.gm, "zero_point", zero))
    for n in (node, *node.users):
        n.args = (*n.args[:2], read, n.args[3], "uint8", *n.args[5:])
        c.numbers.pop(n, None)
    node.meta["val"] = val(node).to(torch.uint8)
