"""A run of nodes of a Q-DQ graph as one TorchScript function, in the form that IPEX's fusion looks for.

    inc::quantize, inc::dequantize (one static 8-bit scale)     aten::quantize_per_tensor, aten::dequantize
    inc::dequantize of a constant, one scale per channel        aten::dequantize of a tensor quantized per channel
    aten operators, sizes and arithmetic on them                as they are

The function is written node by node, not traced: sizes stay what they are in the graph, so that it holds for every
shape that the graph holds for, and nothing is run to make it. Constants are the graph's own tensors, except quantized
weights, which torch keeps in a type of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.graph import get_attr, get_tensor, val
from inc_graph.lowering._context import CODES, FULL, OneDnnContext, QParams
from inc_graph.oppattern import argument, pattern_of
from inc_graph.ops import is_dequantize, is_quantize
from inc_graph.qtypes import get_qtype

__all__ = ["Written", "constant", "scriptable", "write"]

aten = torch.ops.aten

_ARITHMETIC = {
    operator.add: "aten::add",
    operator.sub: "aten::sub",
    operator.mul: "aten::mul",
    operator.floordiv: "aten::floordiv",
    operator.mod: "aten::remainder",
    operator.neg: "aten::neg",
}
_FORMATS = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}
_RENAMED = {aten.relu6.default: (aten.hardtanh.default, (0.0, 6.0)), aten.sym_size.int: (aten.size.int, ())}
"""Operators that have another name, or one that IPEX fuses, in TorchScript; and the arguments that this one takes."""
_LARGE = 2.0**20  # codes; torch's kernel adds zero points in int32 before torch 2.9
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_COMPUTING = ("anchor", "follower", "activation")
_BOUNDED = (
    aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.batch_norm.default,
    aten.softmax.int, aten.scaled_dot_product_attention.default, aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default, aten.mean.dim,
)  # fmt: skip
"""Operators whose results are not large unless their inputs are."""


# ------------------------------------------------------------------------------------------------ what can be written
def _axis(node: fx.Node) -> int | None:
    """The one dimension along which the scales of a dequantized constant differ, 0 if none does; else None."""
    block = list(node.args[3])  # type: ignore[arg-type]
    axes = [d for d, b in enumerate(block) if b != -1]
    return None if len(axes) > 1 or any(block[d] != 1 for d in axes) else (axes or [0])[0]


def _is_bmm(node: fx.Node) -> bool:
    """Whether a product is one of two batches of matrices, of equal size: under this name IPEX fuses it."""
    if node.target is not aten.matmul.default:
        return False
    a, b = (val(argument(node, i)).shape for i in (0, 1))
    return len(a) == len(b) == 3 and str(a[0]) == str(b[0])


def _is_square(node: fx.Node) -> bool:
    """Whether both operands of a product are one value: oneDNN Graph does not come back from compiling that."""
    return node.target in _PRODUCTS and argument(node, 0) is argument(node, 1)


def scriptable(c: OneDnnContext, node: fx.Node) -> bool:
    """Whether a call can be a part of a TorchScript function."""
    if is_quantize(node):
        return c.qparams(node) is not None and val(node.args[0]).dtype == torch.float32
    if is_dequantize(node):
        return _static(c, node)
    if node.op != "call_function":
        return False
    if node.target in _ARITHMETIC:
        return all(isinstance(val(n), int | torch.SymInt) for n in (node, *node.all_input_nodes))
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or _is_square(node) or getattr(node.target, "namespace", "") != "aten":
        return False
    return all(_written(a) for a in _leaves(node)) and all(str(r.type) in _RETURNS for r in schema.returns)


_RETURNS = ("Tensor", "List[Tensor]", "int", "float", "bool")


def _leaves(node: fx.Node) -> list[Any]:
    """Arguments of a call, lists flattened."""
    found: list[Any] = []
    todo: list[Any] = [*node.args, *node.kwargs.values()]
    while todo:
        arg = todo.pop()
        if isinstance(arg, list | tuple):
            todo += arg
        else:
            found.append(arg)
    return found


def _written(arg: Any) -> bool:
    if isinstance(arg, fx.Node):
        value = val(arg)
        if isinstance(value, Tensor):
            return value.layout == torch.strided and value.device.type == "cpu"
        return isinstance(value, int | torch.SymInt | list | tuple)
    plain = int | float | str | torch.dtype | torch.device | torch.layout | torch.memory_format
    return arg is None or isinstance(arg, plain)


def _static(c: OneDnnContext, node: fx.Node) -> bool:
    source: Any = node.args[0]
    static = c.qparams(node) is not None and argument(node, 5) == torch.float32
    return static and is_quantize(source) and c.qparams(source) == c.qparams(node)


def constant(c: OneDnnContext, node: fx.Node, written: Collection[str] = ()) -> bool:
    """Whether a function can hold the value of a node: a tensor that no operator writes to (their attributes are
    `written`), or codes of 8 bits that it dequantizes."""
    if node.op == "get_attr":
        return isinstance(val(node), Tensor) and str(node.target) not in written
    if not is_dequantize(node):
        return False
    codes, scale, zero, _, qtype = (argument(node, i) for i in range(5))
    held = all(n is None or n.op == "get_attr" for n in (codes, scale, zero))
    whole = held and all(n is None or val(n).device.type == "cpu" for n in (codes, scale, zero))
    whole = whole and (zero is None or not val(zero).is_floating_point())
    # Of a product with a zero point for each output IPEX reads one for all, and gives wrong numbers.
    whole = whole and (zero is None or val(zero).numel() == 1)
    return whole and qtype in CODES and _axis(node) is not None and argument(node, 5) == torch.float32


# ---------------------------------------------------------------------------------------------------------- writing
@dataclass
class Written:
    """A function, the bytes of its constants, and the codes of its weights by attribute of the graph."""

    function: Any
    nbytes: int = 0
    codes: dict[str, Tensor] = field(default_factory=dict)


def write(c: OneDnnContext, run: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Written:
    """The function of `inputs` that gives a tuple of `outputs`, made of the nodes of `run`; it reads constants by
    itself. Codes that go in or out are plain uint8 or int8 tensors."""
    writer = _Writer(c)
    for node in inputs:
        writer.take(node)
    for node in run:
        writer.call(node)
    writer.give(outputs)
    function = torch._C._create_function_from_graph("forward", writer.graph)
    return Written(function, writer.nbytes, writer.codes)


class _Writer:
    def __init__(self, c: OneDnnContext) -> None:
        self.c, self.graph = c, torch._C.Graph()
        self.values: dict[fx.Node, Any] = {}  # -> a value of the TorchScript graph, or a list of them
        self.nbytes = 0
        self.codes: dict[str, Tensor] = {}
        self._seen: set[int] = set()

    # ------------------------------------------------------------------------------------------------------- parts
    def emit(self, kind: str, args: Sequence[Any], types: Sequence[Any] = (None,)) -> Any:
        """Append an operator; its value, or the list of them where it has several."""
        made = self.graph.create(kind, [self.constant(a) for a in args], len(types))
        self.graph.insertNode(made)
        values = list(made.outputs())
        for value, kind_of in zip(values, types, strict=True):
            if kind_of is not None:
                value.setType(kind_of)
        return values[0] if len(values) == 1 else values

    def constant(self, value: Any) -> Any:
        if isinstance(value, torch._C.Value):
            return value
        if isinstance(value, Tensor) and id(value) not in self._seen:
            self._seen.add(id(value))
            self.nbytes += value.numel() * value.element_size()
        return self.graph.insertConstant(_FORMATS[value] if isinstance(value, torch.memory_format) else value)

    def listed(self, items: Sequence[Any], kind: Any) -> Any:
        """A list of the element type `kind`."""
        element = kind.getElementType()
        return self.emit("prim::ListConstruct", [self.argument(i, element) for i in items], [kind])

    def argument(self, arg: Any, kind: Any, count: int | None = None) -> Any:
        """An argument as the schema's type `kind` wants it."""
        if kind.kind() == "OptionalType":
            return None if arg is None else self.argument(arg, kind.getElementType(), count)
        if isinstance(arg, fx.Node):
            value = self.read(arg)
            return self.listed(value, kind) if isinstance(value, list) else value
        if kind.kind() == "ListType":
            return self.listed(arg if isinstance(arg, list | tuple) else [arg] * (count or 1), kind)
        if kind.kind() == "FloatType" and isinstance(arg, int) and not isinstance(arg, bool):
            return float(arg)
        return bool(arg) if kind.kind() == "BoolType" else arg

    def read(self, node: fx.Node) -> Any:
        """The value of a node; a constant of the graph is written where it is read first."""
        if node not in self.values and is_dequantize(node):
            self.values[node] = self.emit("aten::dequantize", [self.constant(self.weight(node))])
        elif node not in self.values:
            tensor = get_attr(self.c.gm, str(node.target))
            self.values[node] = self.constant(tensor.detach())
        return self.values[node]

    # ------------------------------------------------------------------------------------------- inputs and outputs
    def take(self, node: fx.Node) -> None:
        """Read a node from outside."""
        value = self.graph.addInput(node.name)
        if isinstance(val(node), int | torch.SymInt):
            value.setType(torch._C.IntType.get())
        elif isinstance(val(node), list | tuple):
            value.setType(torch._C.ListType(torch._C.TensorType.get()))
        else:  # a group is compiled for the strides that it has seen first
            value = self.emit("aten::contiguous", [value, torch.contiguous_format])
        self.values[node] = value
        if is_quantize(node):
            p = self.c.qparams(node)
            assert p is not None
            made = self.emit("aten::_make_per_tensor_quantized_tensor", [value, p.scale, p.zero_point])
            self.values[node] = made

    def give(self, outputs: Sequence[fx.Node]) -> None:
        """Let the function end with the values of these nodes."""
        values = [self.values[n] for n in outputs]
        values = [
            self.emit("aten::int_repr", [v]) if is_quantize(n) else v for n, v in zip(outputs, values, strict=True)
        ]
        types = torch._C.TupleType([v.type() for v in values])
        self.graph.registerOutput(self.emit("prim::TupleConstruct", values, [types]))

    # ---------------------------------------------------------------------------------------------------- operators
    def call(self, node: fx.Node) -> None:
        """Write one node of the graph."""
        if is_quantize(node):
            made = self.quantize(node)
        elif is_dequantize(node):
            made = self.emit("aten::dequantize", [self.read(node.args[0])])  # type: ignore[arg-type]
        elif node.target is operator.getitem:
            source, index = self.read(node.args[0]), node.args[1]  # type: ignore[arg-type]
            made = source[index] if isinstance(source, list) else self.emit("aten::__getitem__", [source, index])
        elif node.target in _ARITHMETIC:
            args = [self.read(a) if isinstance(a, fx.Node) else a for a in node.args]
            made = self.emit(_ARITHMETIC[node.target], args, [torch._C.IntType.get()])
        else:
            made = self.operator(node)
        if pattern_of(node) is not None and not isinstance(made, list):
            made.setDebugName(node.name)
        self.values[node] = made

    def operator(self, node: fx.Node) -> Any:
        target, more = (aten.bmm.default, ()) if _is_bmm(node) else _RENAMED.get(node.target, (node.target, ()))
        schema = target._schema
        given = [*node.args, *more]
        args = []
        for i, spec in enumerate(schema.arguments):
            arg = given[i] if i < len(given) else node.kwargs.get(spec.name, spec.default_value)
            args.append(self.argument(arg, spec.type, spec.N))
        made = self.emit(schema.name, args, [r.type for r in schema.returns])
        if len(schema.returns) == 1 and str(schema.returns[0].type) == "List[Tensor]":
            count = len(val(node))
            made = self.emit("prim::ListUnpack", [made], [torch._C.TensorType.get()] * count)
            return made if isinstance(made, list) else [made]
        return made

    def quantize(self, node: fx.Node) -> Any:
        p, source = self.c.qparams(node), node.args[0]
        assert p is not None and isinstance(source, fx.Node)
        x, bounds = self.read(source), self._bounds(p, source)
        if bounds is not None:
            x = self.emit("aten::clamp", [x, *bounds])
        dtype = torch.quint8 if p.dtype == torch.uint8 else torch.qint8
        return self.emit("aten::quantize_per_tensor", [x, p.scale, p.zero_point, dtype])

    def _bounds(self, p: QParams, source: fx.Node) -> tuple[float, float] | None:
        """What to clip at: the ends of a 7-bit format; else a large number, where torch alone quantizes."""
        if p.qtype not in FULL:
            qt = get_qtype(p.qtype)
            return (qt.qmin - p.zero_point) * p.scale, (qt.qmax - p.zero_point) * p.scale
        pattern = pattern_of(source)
        known = source.target in _BOUNDED or (pattern is not None and pattern.role in _COMPUTING)
        if source in self.values and (known or any(is_dequantize(i) for i in source.all_input_nodes)):
            return None
        return -_LARGE * p.scale, _LARGE * p.scale

    def weight(self, node: fx.Node) -> Tensor:
        """The constant behind a dequantize node as torch's quantized tensor, with a scale for each channel.

        Made once for all functions of a graph.
        """
        codes, scale, zero = (argument(node, i) for i in range(3))
        axis = _axis(node)
        assert axis is not None
        key = (str(codes.target), str(scale.target), None if zero is None else str(zero.target), axis)
        if (known := self.c.weights.get(key)) is not None:
            self._seen.add(id(known))  # counted where it was made
            return known  # type: ignore[return-value]
        q, s = get_tensor(self.c.gm, codes), get_tensor(self.c.gm, scale)
        size = q.shape[axis]
        scales = s.reshape(-1).double().expand(size).contiguous()
        zeros = torch.zeros(size, dtype=torch.long)
        if zero is not None:
            zeros = get_tensor(self.c.gm, zero).reshape(-1).long().expand(size).contiguous()
        weight = torch._make_per_channel_quantized_tensor(q.contiguous(), scales, zeros, axis)
        self.codes[str(codes.target)] = self.c.weights[key] = weight  # type: ignore[assignment]
        return weight
