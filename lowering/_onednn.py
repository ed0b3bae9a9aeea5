"""int8 layers on oneDNN: prepacked weights, fused activation, fused residual add, requantized output.

A layer is one immutable object that holds all constants of a convolution or linear layer. Called directly it goes straight to
`torch.ops.onednn`; under torch.compile it goes through one opaque operator of ours, because a packed weight can be neither a
graph constant nor a module buffer there. Accumulation is exact in int32; scaling and post-ops are float32.

Shapes: linear x [*, in] -> [*, out]; convolution x [N, C, *space] -> [N, out, *space'], channels last in memory.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inc_graph.errors import LoweringError

onednn = torch.ops.onednn

try:  # private, and absent before torch 2.9: without it torch.compile breaks the graph at each layer, and works
    from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
    from torch._opaque_base import OpaqueBase

    HAS_OPAQUE = True
except ImportError:
    OpaqueBase, HAS_OPAQUE = object, False  # type: ignore[misc,assignment]

COUNTS: Counter[str] = Counter()
"""Calls of each kernel, counted only while `counting` is on (see `count_kernels`)."""
_counting = False


@dataclass(frozen=True)
class Activation:
    """oneDNN's name of a fused activation function, its numbers and its variant."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


@dataclass(frozen=True)
class Output:
    """What a layer writes: float32 (or bfloat16), or codes of `dtype` with a scale and zero point."""

    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    zero_point: int = 0


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation of a convolution, one entry per space dimension; and its groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def out(self, size: Sequence[Any], kernel: Sequence[int]) -> list[Any]:
        """Output space of an input of space `size`."""
        dims = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in dims]


class Int8Layer(OpaqueBase):  # type: ignore[misc,valid-type]
    """A quantized linear layer (geometry None) or convolution, ready to run.

    Args:
        codes: int8 weight, [out, in] or [out, in / groups, *kernel].
        w_scale: float32 [out].
        bias: float32 [out] or None.
        x_scale, x_zero_point: of the input, uint8 (linear: or int8).
        x_shape: A typical input shape, which the packed layout is chosen for; None if not known.
    """

    def __init__(
        self,
        codes: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        x_scale: float,
        x_zero_point: int,
        geometry: Geometry | None = None,
        activation: Activation = Activation(),  # noqa: B008 - immutable
        output: Output = Output(),  # noqa: B008
        other: tuple[str, float, int] | None = None,
        x_shape: Sequence[int] | None = None,
        name: str = "",
    ) -> None:
        self.name, self.geometry, self.activation, self.output, self.other = name, geometry, activation, output, other
        self.shape = tuple(codes.shape)
        self.w_scale, self.bias = w_scale.contiguous(), bias
        self.w_zero = torch.zeros(len(w_scale), dtype=torch.int32)
        self.x_scale, self.x_zero_point = x_scale, x_zero_point
        if geometry is None:
            self.packed = onednn.qlinear_prepack(codes.contiguous(), list(x_shape) if x_shape else None)
        else:
            g = geometry
            args = (list(g.stride), list(g.padding), list(g.dilation), g.groups, list(x_shape) if x_shape else None)
            self.packed = onednn.qconv_prepack(codes, self.w_scale, x_scale, x_zero_point, *args)
        self._head = (x_scale, x_zero_point, self.packed, self.w_scale, self.w_zero)
        self._out = (output.scale, output.zero_point, output.dtype)
        self._post = (activation.name, list(activation.scalars), activation.algorithm)
        if geometry is not None:
            self._space = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups)
        self._check()

    def _check(self) -> None:
        """Everything the kernels refuse at run time is refused here."""
        if self.geometry is not None and self.other is not None:
            kind = (self.other[0], self.activation.name)
            if kind not in (("sum", "none"), ("sum", "relu")) or len(self.geometry.stride) != 2:
                raise LoweringError(f"no fused form for {kind} of a {len(self.geometry.stride)}-d convolution")

    # ------------------------------------------------------------------------------------------------ execution
    def run(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The layer on codes `x`. With `other`, its value is added before the activation.

        For the "sum" form `other` is written to and returned.
        """
        if _counting:
            COUNTS["linear" if self.geometry is None else "conv"] += 1
        scale, zero, dtype = self._out
        if self.geometry is None:
            if other is None:
                return onednn.qlinear_pointwise.default(x, *self._head, self.bias, scale, zero, dtype, *self._post)
            form, o_scale, o_zero = self.other  # type: ignore[misc]
            return onednn.qlinear_pointwise.binary(
                x, *self._head, other, self.bias, scale, zero, dtype, o_scale, o_zero, form, 1.0, *self._post
            )
        if other is None:
            return onednn.qconv_pointwise.default(x, *self._head, self.bias, *self._space, scale, zero, dtype, *self._post)
        form, o_scale, o_zero = self.other  # type: ignore[misc]
        return onednn.qconv2d_pointwise.binary(
            x, *self._head, other, self.bias, *self._space, scale, zero, dtype, o_scale, o_zero, form, 1.0, *self._post
        )

    def out_shape(self, x: Tensor) -> list[Any]:
        """Output shape for input `x`."""
        if self.geometry is None:
            return [*x.shape[:-1], self.shape[0]]
        return [x.shape[0], self.shape[0], *self.geometry.out(x.shape[2:], self.shape[2:])]

    def empty_out(self, x: Tensor) -> Tensor:
        """An output of the right shape, dtype and memory layout, not filled (for shape propagation)."""
        shape = self.out_shape(x)
        if self.geometry is None:
            return x.new_empty(shape, dtype=self.output.dtype)
        last = x.new_empty([shape[0], *shape[2:], shape[1]], dtype=self.output.dtype)
        return last.permute(0, -1, *range(1, len(shape) - 1))

    # ---------------------------------------------------------------------------------------------------- storage
    def codes(self) -> Tensor:
        """The int8 weight, unpacked: the packed form is the only copy that is kept."""
        dense = self.packed.to_dense()
        return (dense.t() if self.geometry is None else dense.reshape(self.shape)).contiguous()

    def nbytes(self) -> int:
        """Bytes of the weight, its scales and the bias."""
        tensors = (self.w_scale, self.bias)
        return self.packed.numel() + sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Layer:
        return self  # immutable

    def __repr__(self) -> str:
        kind = "linear" if self.geometry is None else f"conv{len(self.geometry.stride)}d"
        fused = [self.other[0]] if self.other else []
        fused += [self.activation.name] if self.activation.name != "none" else []
        return f"Int8Layer({kind} {list(self.shape)}{' + ' + ' + '.join(fused) if fused else ''} -> {self.output.dtype})"


# --------------------------------------------------------------------------------------------- graph call targets
_lib = torch.library.Library("inc_onednn", "FRAGMENT")
if HAS_OPAQUE:
    register_opaque_type(Int8Layer, typ="reference")
    _type = get_opaque_type_name(Int8Layer)
    _lib.define(f"layer(Tensor x, {_type} layer) -> Tensor")
    _lib.define(f"layer_add(Tensor x, Tensor other, {_type} layer) -> Tensor")
    _lib.define(f"layer_sum_(Tensor x, Tensor(a!) other, {_type} layer) -> ()")

    def _real(layer: Any) -> Int8Layer:
        return getattr(layer, "real_obj", layer)

    def _layer(x: Tensor, layer: Any) -> Tensor:
        return _real(layer).run(x)

    def _layer_add(x: Tensor, other: Tensor, layer: Any) -> Tensor:
        return _real(layer).run(x, other)

    def _layer_sum_(x: Tensor, other: Tensor, layer: Any) -> None:
        out = _real(layer).run(x, other)
        if out.data_ptr() != other.data_ptr():
            other.copy_(out)

    for _name, _fn in (("layer", _layer), ("layer_add", _layer_add), ("layer_sum_", _layer_sum_)):
        _lib.impl(_name, _fn, "CompositeExplicitAutograd")
    torch.library.register_fake("inc_onednn::layer", lambda x, layer: _real(layer).empty_out(x), lib=_lib)
    torch.library.register_fake("inc_onednn::layer_add", lambda x, other, layer: _real(layer).empty_out(x), lib=_lib)
    torch.library.register_fake("inc_onednn::layer_sum_", lambda x, other, layer: None, lib=_lib)


def int8_layer(x: Tensor, layer: Int8Layer) -> Tensor:
    """Run a layer on uint8 (or int8) codes."""
    if HAS_OPAQUE and torch.compiler.is_compiling():
        return torch.ops.inc_onednn.layer(x, layer)
    return layer.run(x)


def int8_layer_add(x: Tensor, other: Tensor, layer: Int8Layer) -> Tensor:
    """Run a layer and add `other` (float) before its activation."""
    if HAS_OPAQUE and torch.compiler.is_compiling():
        return torch.ops.inc_onednn.layer_add(x, other, layer)
    return layer.run(x, other)


def int8_layer_sum(x: Tensor, other: Tensor, layer: Int8Layer) -> Tensor:
    """Run a layer and add the codes `other` into their own memory, which is given back. The caller owns `other`."""
    if HAS_OPAQUE and torch.compiler.is_compiling():
        torch.ops.inc_onednn.layer_sum_(x, other, layer)
        return other
    return layer.run(x, other)


if not HAS_OPAQUE:
    Int8Layer.run = torch.compiler.disable(Int8Layer.run)  # type: ignore[method-assign]


def quantize_codes(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """float -> uint8 or int8 codes over the whole range of the type, one pass over the data."""
    if x.dtype != torch.float32 or not x.device.type == "cpu" or torch.compiler.is_compiling():
        info = torch.iinfo(dtype)
        codes = torch.round(x.float() * (1.0 / scale)) + zero_point
        return torch.clamp(codes, info.min, info.max).to(dtype)
    if _counting:
        COUNTS["quantize"] += 1
    qdtype = torch.quint8 if dtype == torch.uint8 else torch.qint8
    if torch.ops.aten.is_non_overlapping_and_dense.default(x):  # any layout without holes: the memory as one row
        q = torch.quantize_per_tensor(x.as_strided((x.numel(),), (1,)), scale, zero_point, qdtype)
        return torch.empty(0, dtype=dtype).set_(q.untyped_storage(), 0, x.shape, x.stride())
    q = torch.quantize_per_tensor(x, scale, zero_point, qdtype).int_repr()
    return torch.empty_like(x, dtype=dtype).copy_(q)  # the layout that shape propagation has promised


# torch warns of a later release than the range this package supports
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel", category=UserWarning)


def dequantize_codes(q: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """codes -> float."""
    return ((q.float() - zero_point) * scale).to(dtype)


def codes_to_unsigned(x: Tensor) -> Tensor:
    """int8 codes as uint8 codes of a zero point 128 higher."""
    return x.view(torch.uint8) ^ 128


def lookup_rows(table: Tensor, scale: Tensor, zero_point: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a quantized table, dequantized after the lookup. table [rows, dim] int8, scale [rows, 1] -> [*index, dim]."""
    codes = table[index].float()
    if zero_point is not None:
        codes = codes - zero_point[index]
    return (codes * scale[index]).to(dtype)


def spread(x: Tensor, stride: Sequence[int], before: Sequence[int], after: Sequence[int], fill: int) -> Tensor:
    """Codes with `stride - 1` fill values between neighbours and a border of `fill`: the input of a transposed convolution."""
    space = [(n - 1) * s + 1 + b + a for n, s, b, a in zip(x.shape[2:], stride, before, after, strict=True)]
    out = torch.full((x.shape[0], *space, x.shape[1]), fill, dtype=x.dtype, device=x.device)
    out = out.permute(0, -1, *range(1, x.ndim - 1))
    where = [slice(None), slice(None)]
    where += [slice(b, b + (n - 1) * s + 1, s) for n, s, b in zip(x.shape[2:], stride, before, strict=True)]
    out[tuple(where)] = x
    return out


class count_kernels:
    """Context manager that counts kernel calls: `with count_kernels() as counts: model(x)`; eager execution only."""

    def __enter__(self) -> Counter[str]:
        global _counting
        COUNTS.clear()
        _counting = True
        return COUNTS

    def __exit__(self, *exc: Any) -> None:
        global _counting
        _counting = False
