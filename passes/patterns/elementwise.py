"""Sums and products of two tensors: worth quantizing only between quantized neighbours."""

import operator

import torch
from torch import fx

from inc_graph.oppattern import OpPattern, argument, register_pattern

aten = torch.ops.aten


def _two_tensors(node: fx.Node) -> str | None:
    for position in (0, 1):
        other = argument(node, position)
        value = other.meta.get("val") if isinstance(other, fx.Node) else None
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or value.ndim == 0:
            return "one operand is a number or an integer tensor"
    return None if argument(node, 0) is not argument(node, 1) else "both operands are the same value"


def _add(node: fx.Node) -> str | None:
    if argument(node, 2) != 1:
        return "alpha is not 1"
    return _two_tensors(node)


_ADD = (torch.add, operator.add, operator.iadd)
_MUL = (torch.mul, torch.multiply, operator.mul, operator.imul)
_POOL = tuple(f"{kind}AvgPool{dims}d" for kind in ("", "Adaptive") for dims in (1, 2, 3))
_POOL_FUNCTIONS = tuple(f"{kind}avg_pool{dims}d" for kind in ("", "adaptive_") for dims in (1, 2, 3))

register_pattern(OpPattern("add", (aten.add.Tensor,), role="follower", inputs=(0, 1), modules=_ADD, check=_add))
register_pattern(OpPattern("mul", (aten.mul.Tensor,), role="follower", inputs=(0, 1), modules=_MUL, check=_two_tensors))
register_pattern(
    OpPattern(
        "avg_pool",
        (
            aten.avg_pool1d.default,
            aten.avg_pool2d.default,
            aten.avg_pool3d.default,
            aten.adaptive_avg_pool1d.default,
            aten.adaptive_avg_pool2d.default,
            aten.adaptive_avg_pool3d.default,
            aten.mean.dim,
        ),
        role="follower",
        modules=(
            *(getattr(torch.nn, name) for name in _POOL),
            *(getattr(torch.nn.functional, name) for name in _POOL_FUNCTIONS),
            torch.mean,
        ),
    )
)
