"""Layers in half precision on oneDNN: weight packed once, activation function and residual sum in the kernel.

torch's own linear layer and convolution bring the weight into oneDNN's layout at each call, and write before an
activation function reads. Products are summed up in float32; what is fused is rounded once, at the end.

Shapes and layouts as those of the int8 layers (`_onednn`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inc_graph.lowering._direct import is_transformed, packed_as_operator
from inc_graph.lowering._half_gradient import by_torch, gradients, is_wanted, with_gradient
from inc_graph.lowering._onednn import HAS_OPAQUE, LIBRARY, PLAIN, Activation, PackedLayer, define, real
from inc_graph.lowering._packed import Geometry

__all__ = ["HalfLayer", "HalfWeight", "half_layer", "half_layer_add", "has_kernels"]

mkldnn = torch.ops.mkldnn


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this dtype on this processor."""
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(mkldnn._is_mkldnn_fp16_supported())


class HalfWeight:
    """A weight [out, in] or [out, in / groups, *kernel] in oneDNN's layout. Immutable; several layers may share it.

    `x_shape` and `geometry` are what the layout is chosen for; other batches and sizes are computed all the same.
    """

    def __init__(self, weight: Tensor, x_shape: Sequence[int], geometry: Geometry | None) -> None:
        self.shape, self.dtype, self._conv = tuple(weight.shape), weight.dtype, geometry is not None
        if geometry is None:
            rows = max(1, torch.Size(x_shape[:-1]).numel())
            self.tensor = mkldnn._reorder_linear_weight(weight.contiguous(), rows)
            return
        stride, padding, dilation, groups = geometry.arguments()
        one = len(geometry.stride) == 1
        weight = weight.unsqueeze(-2) if one else weight
        size = [*x_shape[:2], *([1] * one), *x_shape[2:]]
        self.tensor = mkldnn._reorder_convolution_weight(weight.contiguous(), padding, stride, dilation, groups, size)

    def values(self) -> Tensor:
        """The weight as it was, bit for bit."""
        dense: Tensor = self.tensor.to_dense()
        return dense.reshape(self.shape).contiguous()

    def __copy__(self) -> HalfWeight:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> HalfWeight:
        return self

    def nbytes(self) -> int:
        """Bytes as it is packed."""
        return int(mkldnn._nbytes(self.tensor))


class HalfLayer(PackedLayer):
    """A linear layer (geometry None) or convolution in half precision, ready to run. Immutable.

    Args:
        weight: Packed.
        bias: [out] in the dtype of the weight, or None.
        geometry: Of a convolution.
        activation: Fused behind it, and behind the sum if there is one (convolutions: "none" and "relu").
        counted: Whether `nbytes` counts the weight: False if another layer does.
    """

    def __init__(
        self,
        weight: HalfWeight,
        bias: Tensor | None,
        geometry: Geometry | None = None,
        activation: Activation = PLAIN,
        counted: bool = True,
    ) -> None:
        self.weight, self.bias, self.geometry, self.activation = weight, bias, geometry, activation
        self._counted = counted
        self._flat = geometry is not None and len(geometry.stride) == 1
        self._post = (activation.name, list(activation.scalars), activation.algorithm)

    def run(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The layer on `x`; with `other`, its value is added before the activation function."""
        if not x.numel():
            return self.empty_out(x)
        if self.geometry is None:
            x = x.contiguous()
            if other is not None:
                out: Tensor = mkldnn._linear_pointwise.binary(
                    x, other.contiguous(), self.weight.tensor, self.bias, "add"
                )
                return out
            return mkldnn._linear_pointwise.default(x, self.weight.tensor, self.bias, *self._post)  # type: ignore[no-any-return]
        if self._flat:
            x, other = x.unsqueeze(-2), None if other is None else other.unsqueeze(-2)
        stride, padding, dilation, groups = self.geometry.arguments()
        head = (self.weight.tensor, self.bias, padding, stride, dilation, groups)
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        x = x.contiguous(memory_format=layout)
        if other is None:
            out = mkldnn._convolution_pointwise.default(x, *head, *self._post)
        else:
            other = other.contiguous(memory_format=layout)
            unary = None if self.activation is PLAIN else self.activation.name
            out = mkldnn._convolution_pointwise.binary(x, other, *head, "add", 1.0, unary, [], None)
        return out.squeeze(-2) if self._flat else out

    def empty_out(self, x: Tensor) -> Tensor:
        """An output of the right shape, dtype and memory layout, not filled."""
        if self.geometry is None:
            return x.new_empty([*x.shape[:-1], self.weight.shape[0]])
        space = self.geometry.out(x.shape[2:], self.weight.shape[2:])
        last = x.new_empty([x.shape[0], *space, self.weight.shape[0]])
        return last.permute(0, -1, *range(1, len(space) + 1))

    def nbytes(self) -> int:
        """Bytes of the bias, and of the packed weight unless another layer counts it."""
        return (0 if self.bias is None else self.bias.nbytes) + (self.weight.nbytes() if self._counted else 0)

    def __repr__(self) -> str:
        kind = "linear" if self.geometry is None else f"conv{len(self.geometry.stride)}d"
        return f"HalfLayer({kind} {list(self.weight.shape)} + {self.activation.name}, {self.weight.dtype})"


if HAS_OPAQUE:
    from torch._library.opaque_object import get_opaque_type_name, register_opaque_type

    register_opaque_type(HalfLayer, typ="reference")
    _type = get_opaque_type_name(HalfLayer)
    define(
        f"half_layer(Tensor x, {_type} layer) -> Tensor",
        lambda x, layer: real(layer).run(x),
        lambda x, layer: real(layer).empty_out(x),
    )
    define(
        f"half_layer_add(Tensor x, Tensor other, {_type} layer) -> Tensor",
        lambda x, other, layer: real(layer).run(x, other),
        lambda x, other, layer: real(layer).empty_out(x),
    )

    def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.layer = inputs
        ctx.save_for_backward(*tensors)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            return torch.ops.inc_onednn.half_layer_gradient(grad, *ctx.saved_tensors, ctx.layer), None
        return *torch.ops.inc_onednn.half_layer_add_gradient(grad, *ctx.saved_tensors, ctx.layer), None

    define(
        f"half_layer_gradient(Tensor grad, Tensor x, {_type} layer) -> Tensor",
        lambda grad, x, layer: gradients(real(layer), grad, x)[0],
        lambda grad, x, layer: torch.empty_like(x),
    )
    define(
        f"half_layer_add_gradient(Tensor grad, Tensor x, Tensor other, {_type} layer) -> (Tensor, Tensor)",
        lambda grad, x, other, layer: gradients(real(layer), grad, x, other),
        lambda grad, x, other, layer: (torch.empty_like(x), torch.empty_like(other)),
    )
    for _name in ("half_layer", "half_layer_add"):
        torch.library.register_autograd(f"inc_onednn::{_name}", _backward, setup_context=_keep, lib=LIBRARY)
else:
    HalfLayer.run = torch.compiler.disable(HalfLayer.run)  # type: ignore[method-assign]


def half_layer(x: Tensor, layer: HalfLayer) -> Tensor:
    """Run a layer."""
    if is_transformed():
        return by_torch(layer, x)
    if packed_as_operator(HAS_OPAQUE):
        return torch.ops.inc_onednn.half_layer(x, layer)  # type: ignore[no-any-return]
    return with_gradient(layer, x) if is_wanted(x) else layer.run(x)


def half_layer_add(x: Tensor, other: Tensor, layer: HalfLayer) -> Tensor:
    """Run a layer and add `other` before its activation function."""
    if is_transformed():
        return by_torch(layer, x, other)
    if packed_as_operator(HAS_OPAQUE):
        return torch.ops.inc_onednn.half_layer_add(x, other, layer)  # type: ignore[no-any-return]
    return with_gradient(layer, x, other) if is_wanted(x, other) else layer.run(x, other)
