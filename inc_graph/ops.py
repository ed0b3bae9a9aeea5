"""The ``inc::`` operators: the quantization dialect of the graph, and the only place that registers operators.

Each has the reference implementation of :mod:`inc_graph.numerics` for every device, and a fake one that needs shapes
only (symbolic ones too). They are opaque to export and to compilers, so a graph keeps them until a backend takes them:

* ``inc::quantize(x, scale, zero_point?, block, qtype)``: real values to codes;
* ``inc::dequantize(q, scale, zero_point?, block, qtype, out_dtype)``: codes to real values;
* ``inc::fake_quantize(x, scale, zero_point?, block, qtype)``: both at once, trainable;
* ``inc::choose_qparams(x, block, qtype, method)``: scale and zero point from the tensor itself, at run time;
* ``inc::unpack(packed, qtype, shape)``: bytes to codes.

All are functional: results never alias arguments. Outputs have the strides of ``empty_like`` of the first argument,
except those of ``choose_qparams`` and ``unpack``, which are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inc_graph import numerics, recurrent  # noqa: F401 - registers two operators more
from inc_graph.errors import SpecError
from inc_graph.packing import check_packed
from inc_graph.qtypes import get_qtype
from inc_graph.spec import scale_shape

__all__ = [
    "CHOOSE_QPARAMS",
    "DEQUANTIZE",
    "FAKE_QUANTIZE",
    "NAMESPACE",
    "OPS",
    "QUANTIZE",
    "UNPACK",
    "is_choose_qparams",
    "is_dequantize",
    "is_fake_quantize",
    "is_inc",
    "is_quantize",
    "is_unpack",
]

Tensor = torch.Tensor

NAMESPACE = "inc"

_library = torch.library.Library(NAMESPACE, "DEF")  # kept alive: the operators go when it does
# Results take the strides of an argument, so a compiler may not hand in another layout than the one it traced with.
_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
_TAGS = (torch.Tag.pt2_compliant_tag, _STRIDES)

for _schema in (
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, SymInt[] block, str qtype) -> Tensor",
    "dequantize(Tensor q, Tensor scale, Tensor? zero_point, SymInt[] block, str qtype, ScalarType out_dtype) -> Tensor",
    "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, SymInt[] block, str qtype) -> Tensor",
    "choose_qparams(Tensor x, SymInt[] block, str qtype, str method) -> (Tensor, Tensor)",
    "unpack(Tensor packed, str qtype, SymInt[] shape) -> Tensor",
):
    _library.define(_schema, tags=_TAGS)

for _name in ("quantize", "dequantize", "fake_quantize", "unpack"):
    _library.impl(_name, getattr(numerics, _name), "CompositeExplicitAutograd")
# Without a derivative: that of a scale alone, where codes have none, would be a gradient of nothing.
_library.impl("choose_qparams", torch.no_grad()(numerics.choose_qparams), "CompositeExplicitAutograd")
_library.impl("choose_qparams", torch.library.fallthrough_kernel, "Autograd")

QUANTIZE = torch.ops.inc.quantize.default
DEQUANTIZE = torch.ops.inc.dequantize.default
FAKE_QUANTIZE = torch.ops.inc.fake_quantize.default
CHOOSE_QPARAMS = torch.ops.inc.choose_qparams.default
UNPACK = torch.ops.inc.unpack.default
OPS = (QUANTIZE, DEQUANTIZE, FAKE_QUANTIZE, CHOOSE_QPARAMS, UNPACK)


# -- shapes only -----------------------------------------------------------------------------------


@torch.library.register_fake("inc::quantize", lib=_library)
def _quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str) -> Tensor:
    _need_float(x)
    numerics.check_layout(x.shape, scale, zero_point, block)
    return torch.empty_like(x, dtype=get_qtype(qtype).carrier)


@torch.library.register_fake("inc::dequantize", lib=_library)
def _dequantize_fake(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str, out_dtype: torch.dtype
) -> Tensor:
    qt = get_qtype(qtype)
    if q.dtype != qt.carrier:
        raise SpecError(f"{qt.name} values are held in {qt.carrier}, not {q.dtype}")
    numerics.check_layout(q.shape, scale, zero_point, block)
    return torch.empty_like(q, dtype=out_dtype)


@torch.library.register_fake("inc::fake_quantize", lib=_library)
def _fake_quantize_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str
) -> Tensor:
    _need_float(x)
    get_qtype(qtype)
    numerics.check_layout(x.shape, scale, zero_point, block)
    return torch.empty_like(x)


@torch.library.register_fake("inc::choose_qparams", lib=_library)
def _choose_qparams_fake(x: Tensor, block: Sequence[int], qtype: str, method: str) -> tuple[Tensor, Tensor]:
    _need_float(x)
    numerics.check_scheme(get_qtype(qtype), method)
    shape = scale_shape(x.shape, block)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("inc::unpack", lib=_library)
def _unpack_fake(packed: Tensor, qtype: str, shape: Sequence[int]) -> Tensor:
    qt = get_qtype(qtype)
    check_packed(packed, qt, shape)
    return packed.new_empty(tuple(shape), dtype=qt.carrier)


def _need_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise SpecError(f"only floating point tensors can be quantized, not {x.dtype}")


# -- gradient --------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.block, ctx.qtype = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    """Gradient of fake quantization with rounding taken as the identity.

    To ``x``: the incoming gradient inside the range and zero where the value saturated. To ``scale`` (learned step
    size, Esser et al. 2020, without its gradient scaling): with ``y = scale * Q(x / scale)``, ``dy/dscale = Q(x /
    scale) - x / scale`` inside the range and ``Q(x / scale)``, the bound that was hit, outside; summed over each block.
    """
    x, scale, zero_point = ctx.saved_tensors
    need_x, need_scale = ctx.needs_input_grad[:2]
    inside = numerics.in_range(x, scale, zero_point, ctx.block, ctx.qtype)
    grad_x = torch.where(inside, grad, 0) if need_x else None
    if not need_scale:
        return grad_x, None, None, None, None
    rounded = FAKE_QUANTIZE(x.detach().float(), scale.detach(), zero_point, ctx.block, ctx.qtype)
    steps = numerics.per_block(rounded - torch.where(inside, x.float(), 0), scale, ctx.block)
    grad_scale = numerics.block_reduce(grad.float() * steps, ctx.block, "sum").to(scale.dtype)
    return grad_x, grad_scale, None, None, None


torch.library.register_autograd("inc::fake_quantize", _straight_through, setup_context=_save, lib=_library)


# -- recognizing them in a graph -------------------------------------------------------------------


def _calls(node: Any, target: Any) -> bool:
    return getattr(node, "op", None) == "call_function" and node.target is target


def is_quantize(node: Any) -> bool:
    """True for a graph node that calls ``inc::quantize``."""
    return _calls(node, QUANTIZE)


def is_dequantize(node: Any) -> bool:
    """True for a graph node that calls ``inc::dequantize``."""
    return _calls(node, DEQUANTIZE)


def is_fake_quantize(node: Any) -> bool:
    """True for a graph node that calls ``inc::fake_quantize``."""
    return _calls(node, FAKE_QUANTIZE)


def is_choose_qparams(node: Any) -> bool:
    """True for a graph node that calls ``inc::choose_qparams``."""
    return _calls(node, CHOOSE_QPARAMS)


def is_unpack(node: Any) -> bool:
    """True for a graph node that calls ``inc::unpack``."""
    return _calls(node, UNPACK)


def is_inc(node: Any) -> bool:
    """True for a graph node that calls any operator of this dialect."""
    return any(_calls(node, op) for op in OPS)
