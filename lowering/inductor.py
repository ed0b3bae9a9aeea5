"""CPU backend: Q-DQ to oneDNN int8 layers, fast when called directly and under torch.compile.

    dequantize(x) , dequantize(w) -> linear | conv  [-> + other] [-> activation] [-> quantize]    becomes one Int8Layer
    dequantize(x) -> view | max_pool | cat | pad -> quantize (same scale)                          runs on the codes
    dequantize(table) -> embedding                                                                 looks up codes

What is left of quantize and dequantize becomes one fast pass over the data (eager) or is fused by inductor (compiled).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from inc_graph.graph import (
    fake_call,
    get_tensor,
    insert_call,
    is_float,
    replace_uses,
    set_module,
    unique_name,
    val,
)
from inc_graph.lowering import _onednn
from inc_graph.lowering._onednn import Activation, Geometry, Int8Layer, Output
from inc_graph.lowering.base import Backend, Claim, Context
from inc_graph.ops import is_dequantize, is_quantize
from inc_graph.oppattern import argument, pattern_of
from inc_graph.registry import BACKENDS

aten = torch.ops.aten

_CODES = {"uint8": torch.uint8, "int8": torch.int8, "uint7": torch.uint8, "int7": torch.int8}
_FULL = ("uint8", "int8")  # a layer saturates at the end of the dtype: right for these, not for the 7-bit types
_LINEAR = (aten.linear.default,)
_CONV = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass(frozen=True)
class QParams:
    """Per-tensor quantization as numbers."""

    scale: float
    zero_point: int
    qtype: str


@dataclass
class _Context(Context):
    constants: dict[fx.Node, QParams | None] = field(default_factory=dict)

    def qparams(self, node: fx.Node) -> QParams | None:
        """Numbers of a quantize or dequantize node if it is static and per tensor in an 8-bit integer type."""
        if node not in self.constants:
            self.constants[node] = self._read(node)
        return self.constants[node]

    def _read(self, node: fx.Node) -> QParams | None:
        _, scale, zero, block, qtype = node.args[:5]
        if qtype not in _CODES or any(b != -1 for b in block):  # type: ignore[union-attr]
            return None
        numbers = []
        for n in (scale, zero):
            if n is not None and (n.op != "get_attr" or (t := get_tensor(self.gm, n)).numel() != 1):  # type: ignore[union-attr]
                return None
            numbers.append(0 if n is None else get_tensor(self.gm, n).item())  # type: ignore[arg-type]
        return QParams(float(numbers[0]), int(numbers[1]), str(qtype))


# ------------------------------------------------------------------------------------------- operators that move codes
def _move(c: _Context, node: fx.Node) -> str | None:
    pattern = pattern_of(node)
    assert pattern is not None
    inputs = list(pattern.activations(node))
    if not inputs or not all(is_dequantize(v) for v in inputs) or not all(is_quantize(u) for u in node.users):
        return ""
    params = {c.qparams(n) for n in (*inputs, *node.users)}
    if len(params) != 1 or (p := params.pop()) is None:
        return ""
    if pattern.name in ("avg_pool", "add", "mul"):
        return ""
    codes = {v: v.args[0] for v in inputs}
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: codes.get(n, n))
    if pattern.name == "pad":
        args = (*args[:2], "constant", p.zero_point)
    try:
        fake_call(c.gm, node.target, args, kwargs)  # type: ignore[arg-type]
    except (NotImplementedError, RuntimeError):
        return "this operator does not take integers"
    new = insert_call(c.gm, node.target, args, kwargs, before=node, like=node)  # type: ignore[arg-type]
    for user in list(node.users):
        replace_uses(user, new)
    return None


# --------------------------------------------------------------------------------------------------------- the layers
@dataclass
class _Tail:
    """What follows a layer and fuses with it."""

    end: fx.Node  # its value is the layer's result
    place: fx.Node  # the fused layer stands before this node
    activation: Activation = field(default_factory=Activation)
    output: Output = field(default_factory=Output)
    quantize: fx.Node | None = None
    other: fx.Node | None = None  # float value, or codes for the form "sum"
    form: tuple[str, float, int] | None = None


def _activation(node: fx.Node, conv: bool) -> Activation | None:
    """The fused form of an activation node, None if oneDNN has none."""
    t = node.target
    if t is aten.relu.default:
        return Activation("relu")
    if t is aten.relu6.default:
        return Activation("hardtanh", (0.0, 6.0))
    if t in (aten.hardtanh.default, aten.clamp.default):
        low, high = argument(node, 1), argument(node, 2)
        if isinstance(low, int | float) and isinstance(high, int | float):
            return Activation("hardtanh", (float(low), float(high)))
        return Activation("relu") if low == 0 and high is None else None
    if t is aten.hardswish.default:
        return Activation("hardswish")
    if t is aten.silu.default:
        return Activation("swish")
    if conv:
        return None
    if t is aten.gelu.default:
        return Activation("gelu", (), str(argument(node, 1)))
    if t is aten.tanh.default:
        return Activation("tanh")
    if t is aten.leaky_relu.default:
        return Activation("leaky_relu", (float(argument(node, 1)),))
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _tail(c: _Context, layer: fx.Node, conv: bool) -> _Tail:
    tail = _Tail(layer, layer, output=Output(val(layer).dtype))
    user = _only_user(layer)
    if user is not None and user.target is aten.add.Tensor and not user.kwargs:
        _take_add(c, tail, user, conv)
    elif user is not None and (activation := _fusable(user, conv)) is not None:
        tail.end, tail.activation = user, activation
    _take_quantize(c, tail)
    return tail


def _fusable(node: fx.Node, conv: bool) -> Activation | None:
    pattern = pattern_of(node)
    return _activation(node, conv) if pattern is not None and pattern.role == "activation" else None


def _take_quantize(c: _Context, tail: _Tail) -> None:
    user = _only_user(tail.end)
    if user is not None and is_quantize(user) and (p := c.qparams(user)) is not None and p.qtype in _FULL:
        tail.quantize, tail.output = user, Output(_CODES[p.qtype], p.scale, p.zero_point)


def _take_add(c: _Context, tail: _Tail, add: fx.Node, conv: bool) -> None:
    """Fuse `layer + other` if oneDNN can."""
    layer = tail.end
    other: Any = add.args[1] if add.args[0] is layer else add.args[0]
    if not isinstance(other, fx.Node) or other is layer or not _same_shape(other, layer):
        return
    after = _only_user(add)
    relu = after if after is not None and after.target is aten.relu.default else None
    end = relu or add
    if not conv:
        if val(other).dtype == torch.float32 == val(layer).dtype:
            tail.end, tail.place, tail.other, tail.form = end, add, other, ("add", 1.0, 0)
            tail.activation = Activation("relu") if relu else Activation()
        return
    if not is_dequantize(other) or (p := c.qparams(other)) is None or layer.target is not aten.conv2d.default:
        return
    quantize = _only_user(end)
    if quantize is None or not is_quantize(quantize) or (out := c.qparams(quantize)) is None or out.qtype not in _FULL:
        return
    if _CODES[out.qtype] != _CODES[p.qtype]:
        return
    tail.end, tail.place, tail.form = end, add, ("sum", p.scale, p.zero_point)
    tail.activation = Activation("relu") if relu else Activation()
    tail.other = other.args[0]  # type: ignore[assignment]
    if not _owned(tail.other, add):  # type: ignore[arg-type]
        tail.other = insert_call(c.gm, aten.clone.default, (tail.other,), before=add)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = val(a), val(b)
    return isinstance(x, torch.Tensor) and x.ndim == y.ndim and all(str(m) == str(n) for m, n in zip(x.shape, y.shape))


def _owned(codes: fx.Node, add: fx.Node) -> bool:
    """True if `add` may write into the memory of `codes`: made here, not seen through a view, and not read later."""
    if not is_quantize(codes) and codes.target is not _onednn.int8_layer:
        return False
    readers: list[fx.Node] = []
    for user in codes.users:
        readers += list(user.users) if is_dequantize(user) else [user]
    return all(r is add or _runs_at(r) < add for r in readers)


def _runs_at(reader: fx.Node) -> fx.Node:
    """Where a reader will stand once it is fused: a layer whose only user is an add moves there."""
    user = _only_user(reader)
    if user is not None and user.target is aten.add.Tensor and reader.target in (*_LINEAR, *_CONV, *_TRANSPOSED):
        return user
    return reader


def _input(c: _Context, node: fx.Node) -> tuple[fx.Node, QParams] | str:
    x: Any = node.args[0]
    if not is_dequantize(x):
        return ""  # weight only, or float: nobody asked for an int8 kernel
    p = c.qparams(x)
    return (x.args[0], p) if p is not None else "its input is not quantized per tensor in 8 bits"


@dataclass
class _Weight:
    codes: torch.Tensor  # int8 [out, in / groups, *kernel]
    scale: torch.Tensor  # float32 [out]
    attr: str


def _weight(c: _Context, node: fx.Node, axis: int) -> _Weight | str:
    w: Any = node.args[1]
    if not is_dequantize(w):
        return "its weight is float"
    codes, scale, zero, block, qtype = w.args[:5]
    if codes.op != "get_attr" or scale.op != "get_attr":
        return "its weight is not a constant"
    if qtype not in ("int8", "int7") or (zero is not None and bool(get_tensor(c.gm, zero).any())):
        return f"weights of type {qtype}{' with a zero point' if zero is not None else ''}; the kernel takes symmetric int8"
    per_channel = all(b == (1 if d == axis else -1) for d, b in enumerate(block))
    if not per_channel and any(b != -1 for b in block):
        return f"weight block {list(block)}; the kernel takes one scale per output channel or per tensor"
    q = get_tensor(c.gm, codes)
    s = get_tensor(c.gm, scale).reshape(-1)
    return _Weight(q, s.expand(q.shape[axis]).contiguous(), codes.target)


def _bias(c: _Context, node: fx.Node) -> torch.Tensor | None | str:
    bias: Any = argument(node, 2)
    if bias is None:
        return None
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return "its bias is computed at run time"
    return get_tensor(c.gm, bias).detach().float().contiguous()


def _typical(node: fx.Node) -> list[int]:
    return [d if isinstance(d, int) else getattr(getattr(d, "node", None), "hint", None) or 8 for d in val(node).shape]


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    return items * dims if len(items) == 1 else items


def _geometry(node: fx.Node, kernel: tuple[int, ...]) -> Geometry | str:
    dims = len(kernel)
    stride, padding, dilation, groups = (argument(node, i) for i in (3, 4, 5, 6))
    dilation = _tuple(dilation, dims)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return "'same' padding of an even kernel is not the same on both sides"
        padding = [t // 2 for t in total]
    return Geometry(_tuple(stride, dims), _tuple(padding, dims), dilation, int(groups))


def _layer(c: _Context, node: fx.Node) -> str | None:
    conv = node.target in _CONV
    found = _input(c, node)
    weight = _weight(c, node, 0) if not isinstance(found, str) else found
    bias = _bias(c, node)
    for item in (found, weight, bias):
        if isinstance(item, str):
            return item
    x, p = found  # type: ignore[misc]
    assert isinstance(weight, _Weight) and not isinstance(bias, str)
    codes, geometry, crop = weight.codes, None, None
    if conv:
        geometry = _geometry(node, tuple(codes.shape[2:]))
        if isinstance(geometry, str):
            return geometry
        x, codes, geometry, crop = _absorb_pad(x, p, codes, geometry)
        x, p = _unsigned(c, x, p, node)
    _emit(c, node, x, p, codes, weight, bias, geometry, crop, conv)
    return None


def _unsigned(c: _Context, x: fx.Node, p: QParams, node: fx.Node) -> tuple[fx.Node, QParams]:
    """The convolution kernel takes uint8 only: int8 codes move up by 128."""
    if _CODES[p.qtype] == torch.uint8:
        return x, p
    x = insert_call(c.gm, _onednn.codes_to_unsigned, (x,), before=node)
    return x, QParams(p.scale, p.zero_point + 128, "uint8")


def _absorb_pad(x: fx.Node, p: QParams, codes: torch.Tensor, g: Geometry) -> tuple[fx.Node, torch.Tensor, Geometry, Any]:
    """Padding that differs from side to side, as a larger kernel with zero taps under the larger padding on both sides.

    With left L and right R and S = max(L, R), zero taps S - L before and S - R after the kernel give the same outputs.
    """
    if x.target is not aten.pad.default or argument(x, 3) != p.zero_point or any(d != 1 for d in g.dilation):
        return x, codes, g, None
    dims = len(g.stride)
    widths = list(x.args[1])  # type: ignore[arg-type]
    if len(widths) > 2 * dims or any(not isinstance(w, int) or w < 0 for w in widths):
        return x, codes, g, None
    widths += [0] * (2 * dims - len(widths))
    sides = [(q + widths[2 * i], q + widths[2 * i + 1]) for i, q in zip(range(dims - 1, -1, -1), g.padding, strict=True)]
    both = tuple(max(side) for side in sides)
    taps = [(s - left, s - right) for s, (left, right) in zip(both, sides, strict=True)]
    if sum(max(t) for t in taps) > 2 * dims:  # a kernel much larger than the old one costs more than the copy
        return x, codes, g, None
    flat = [n for t in reversed(taps) for n in t]
    kernel = codes.shape[2:]
    crop = (slice(None), slice(None), *(slice(a, a + k) for (a, _), k in zip(taps, kernel, strict=True)))
    return x.args[0], torch.nn.functional.pad(codes, flat), Geometry(g.stride, both, g.dilation, g.groups), crop  # type: ignore[return-value]


def _emit(
    c: _Context,
    node: fx.Node,
    x: fx.Node,
    p: QParams,
    codes: torch.Tensor,
    weight: _Weight,
    bias: torch.Tensor | None,
    geometry: Geometry | None,
    crop: Any,
    conv: bool,
    restore: Any = None,
) -> Int8Layer:
    """Build the layer with what fuses behind `node` and put its call in their place."""
    tail = _tail(c, node, conv)
    if tail.output.dtype not in (torch.float32, torch.bfloat16, torch.uint8, torch.int8):
        tail.output = Output()
    layer = Int8Layer(
        codes, weight.scale, bias, p.scale, p.zero_point, geometry, tail.activation, tail.output, tail.form, _typical(x), node.name
    )  # fmt: skip
    name = unique_name(c.gm, f"layer_{node.name}")
    setattr(c.gm, name, layer)
    with c.gm.graph.inserting_before(tail.place):
        read = c.gm.graph.create_node("get_attr", name, (), {})
    args = (x, read) if tail.other is None else (x, tail.other, read)
    target = {None: _onednn.int8_layer, "add": _onednn.int8_layer_add, "sum": _onednn.int8_layer_sum}
    with c.gm.graph.inserting_before(tail.place):
        call = c.gm.graph.create_node("call_function", target[tail.form and tail.form[0]], args, {})
    result = tail.quantize or tail.end
    call.meta = {k: v for k, v in result.meta.items() if k != "custom"}
    call.meta["val"] = layer.empty_out(val(x))
    if tail.quantize is None and tail.output.dtype != val(tail.end).dtype:
        call = insert_call(c.gm, aten._to_copy.default, (call,), {"dtype": val(tail.end).dtype}, after=call)
    replace_uses(result, call)
    if restore is None:
        restore = (lambda: layer.codes()[crop].contiguous()) if crop is not None else layer.codes
    c.packed[weight.attr] = restore
    if tail.place is not node:
        c.absorbed[tail.place.name] = node.name
    return layer


def _transposed(c: _Context, node: fx.Node) -> str | None:
    """A transposed convolution is a convolution of the spread-out input with the mirrored kernel."""
    found = _input(c, node)
    weight = _weight(c, node, 1) if not isinstance(found, str) else found
    bias = _bias(c, node)
    for item in (found, weight, bias):
        if isinstance(item, str):
            return item
    x, p = found  # type: ignore[misc]
    assert isinstance(weight, _Weight) and not isinstance(bias, str)
    kernel = tuple(weight.codes.shape[2:])
    dims = len(kernel)
    stride, padding, extra, groups, dilation = (argument(node, i) for i in (3, 4, 5, 6, 7))
    if groups != 1:
        return "grouped transposed convolution"
    stride, padding, extra, dilation = (_tuple(v, dims) for v in (stride, padding, extra, dilation))
    before = [d * (k - 1) - q for d, k, q in zip(dilation, kernel, padding, strict=True)]
    if any(b < 0 for b in before):
        return "padding larger than the kernel reaches"
    after = [b + e for b, e in zip(before, extra, strict=True)]
    x, p = _unsigned(c, x, p, node)
    spread = insert_call(c.gm, _onednn.spread, (x, list(stride), before, after, p.zero_point), before=node)
    space = list(range(2, dims + 2))
    codes = weight.codes.transpose(0, 1).flip(space).contiguous()
    geometry = Geometry((1,) * dims, (0,) * dims, dilation, 1)

    def restore() -> torch.Tensor:
        return layer.codes().flip(space).transpose(0, 1).contiguous()

    layer = _emit(c, node, spread, p, codes, weight, bias, geometry, None, True, restore)
    return None


# ------------------------------------------------------------------------------------------------ lookups, conversions
def _lookup(c: _Context, node: fx.Node) -> str | None:
    table: Any = node.args[0]
    if not is_dequantize(table):
        return ""
    codes, scale, zero, block, qtype = table.args[:5]
    if codes.op != "get_attr" or qtype not in _CODES or list(block) != [1, -1]:
        return f"a table of {qtype} in blocks {list(block)}; the kernel takes 8-bit rows"
    args = (codes, scale, zero, node.args[1], val(node).dtype)
    new = insert_call(c.gm, _onednn.lookup_rows, args, before=node, like=node)
    replace_uses(node, new)
    return None


def _quantize(c: _Context, node: fx.Node) -> str | None:
    p = c.qparams(node)
    if p is None or p.qtype not in _FULL or not is_float(node.args[0]):  # type: ignore[arg-type]
        return ""
    args = (node.args[0], p.scale, p.zero_point, _CODES[p.qtype])
    replace_uses(node, insert_call(c.gm, _onednn.quantize_codes, args, before=node, like=node))
    return None


def _dequantize(c: _Context, node: fx.Node) -> str | None:
    p = c.qparams(node)
    if p is None or node.args[0].op == "get_attr":  # type: ignore[union-attr]
        return ""
    args = (node.args[0], p.scale, p.zero_point, node.args[5])
    replace_uses(node, insert_call(c.gm, _onednn.dequantize_codes, args, before=node, like=node))
    return None


def _is_carrier(node: fx.Node) -> bool:
    pattern = pattern_of(node)
    return pattern is not None and pattern.role == "carrier"


class Inductor(Backend):
    """oneDNN int8 on x86 CPUs; under torch.compile inductor fuses what is between the layers."""

    name = "inductor"
    capabilities = {
        kind: (("uint8", "int8"), ("int8", "int8"), ("uint7", "int7"))
        for kind in (
            "linear",
            "conv1d",
            "conv2d",
            "conv3d",
            "conv_transpose1d",
            "conv_transpose2d",
            "conv_transpose3d",
            "add",
        )
    } | {"embedding": ((None, "int8"),)}

    def available(self) -> str | None:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"oneDNN's int8 layers need an x86 CPU, this is {platform.machine()}"
        return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"

    def start(self, gm: fx.GraphModule) -> _Context:
        return _Context(gm)

    def claims(self) -> tuple[Claim, ...]:
        def calls(targets: Any) -> Any:
            return lambda node: node.op == "call_function" and node.target in targets

        return (
            Claim("move", _is_carrier, _move, kernel=False),
            Claim("int8 convolution", calls(_CONV), _layer),
            Claim("int8 linear", calls(_LINEAR), _layer),
            Claim("int8 transposed convolution", calls(_TRANSPOSED), _transposed),
            Claim("int8 lookup", calls((aten.embedding.default,)), _lookup),
            Claim("quantize", is_quantize, _quantize, kernel=False),
            Claim("dequantize", is_dequantize, _dequantize, kernel=False),
        )


BACKENDS.add("inductor", Inductor())
