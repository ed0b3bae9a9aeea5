"""Gradients through layers in half precision: to what comes in, not to the weight.

oneDNN's packed layers have none of their own, and torch would let them pass as if nothing had come in. What is computed
is the packed layer; its gradient is that of the same layer written with torch's operators.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from inc_graph.lowering._onednn import Activation
from inc_graph.lowering._packed import Geometry

__all__ = ["by_torch", "gradients", "is_wanted", "with_gradient"]


class Layer(Protocol):
    """What is asked of a packed layer."""

    weight: Any
    bias: Tensor | None
    geometry: Geometry | None
    activation: Activation

    def run(self, x: Tensor, other: Tensor | None = None) -> Tensor: ...


_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def is_wanted(*inputs: Tensor) -> bool:
    """Whether a gradient to one of them is recorded."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def by_torch(layer: Layer, x: Tensor, other: Tensor | None = None) -> Tensor:
    """The layer written with torch's operators."""
    with torch._C._DisableFuncTorch():  # a transform does not know oneDNN's layouts
        weight = layer.weight.values()
    bias, geometry, act = layer.bias, layer.geometry, layer.activation
    if geometry is None:
        y = F.linear(x, weight, bias)
    else:
        args = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        y = _CONVS[len(geometry.stride)](x, weight, bias, *args)
    y = y if other is None else y + other
    match act.name:
        case "none":
            return y
        case "gelu":
            return F.gelu(y, approximate=act.algorithm)
        case "leaky_relu":
            return F.leaky_relu(y, *act.scalars)
        case "hardtanh":
            return F.hardtanh(y, *act.scalars)
        case "swish":
            return F.silu(y)
        case "hardswish":
            return F.hardswish(y)
        case "tanh":
            return torch.tanh(y)
        case "relu":
            return F.relu(y)
    raise NotImplementedError(f"no gradient for a layer with {act.name} behind it")


def gradients(layer: Layer, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of the layer's inputs (x, or x and the value that is added), given that of its output."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = by_torch(layer, leaves[0], leaves[1] if len(leaves) > 1 else None)
    return torch.autograd.grad(y, leaves, grad)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, *inputs: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*inputs)
        return layer.run(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *gradients(ctx.layer, grad, *ctx.saved_tensors)


def with_gradient(layer: Layer, *inputs: Tensor) -> Tensor:
    """The layer on its inputs, with a gradient to them."""
    out: Tensor = _WithGradient.apply(layer, *inputs)
    return out
