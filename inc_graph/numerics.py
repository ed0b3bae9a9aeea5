"""The reference maths of quantization in plain torch: what every operator, backend and test is measured against.

Terms: ``block`` says how many neighbours share a scale (see :mod:`inc_graph.spec`), ``scale`` and ``zero_point`` have
the shape ``scale_shape(x.shape, block)`` and so the same number of dimensions as ``x``.

Rules, for all functions:

* arithmetic is float32 (float64 for formats wider than 16 bits, which float32 cannot hold);
* integers: ``q = clamp(round_half_even(x * (1 / scale)) + zero_point, qmin, qmax)``. The reciprocal, not a division, is
  what ``torch.fake_quantize_*`` and the ``quantized_decomposed`` operators compute, so results agree with them bit for
  bit;
* floats: ``q = cast(clamp(x * (1 / scale), qmin, qmax))``, codebooks: the index of the value nearest to
  ``x * (1 / scale)``, ties to the even index (which for small floats is the even mantissa). Neither kind has a zero
  point: one that is given must hold zeros and is not read;
* a zero point that is not whole (a float tensor) is added before rounding: ``q = clamp(round(x * (1 / scale) +
  zero_point), qmin, qmax)``;
* back: ``(q - zero_point) * scale``, then one cast to the wanted dtype;
* infinities saturate. NaN stays NaN where the format has one (float8), else it quantizes as 0.0 would.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Sequence

import torch

from inc_graph.blocks import align, block_range, block_reduce, check_layout, per_block
from inc_graph.errors import SpecError
from inc_graph.packing import pack, unpack
from inc_graph.qtypes import QType, get_qtype
from inc_graph.spec import SCHEMES

__all__ = [
    "affine_qparams",
    "align",
    "block_range",
    "block_reduce",
    "check_layout",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "in_range",
    "pack",
    "per_block",
    "quantize",
    "unpack",
]

Tensor = torch.Tensor

# Keeps 1 / scale, and its product with ordinary values, finite.
MIN_SCALE = 2.0**-120
# A code can stand for a value a little beyond the range it was made for; that value must be finite too.
MAX_BOUND = torch.finfo(torch.float32).max / 2


# -- quantize and back -----------------------------------------------------------------------------


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str | QType) -> Tensor:
    """Real values to codes.

    Args:
        x: Floating point tensor.
        scale: Positive; shape ``scale_shape(x.shape, block)``.
        zero_point: Of the scale's shape: int8, uint8, int32, or real numbers; or None for 0.
        block: One entry per dimension of ``x``.
        qtype: Name of the number format.

    Returns:
        Tensor of the format's carrier dtype with the shape and strides of ``x``.

    Raises:
        SpecError: if ``x`` is not floating point or the shapes do not fit.
    """
    qt = get_qtype(qtype)
    _check_float(x)
    check_layout(x.shape, scale, zero_point, block)
    codes = _codes(x, scale, zero_point, block, qt).reshape(x.shape)
    return torch.empty_like(x, dtype=qt.carrier).copy_(codes)  # the cast to the carrier, into the strides of x


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block: Sequence[int],
    qtype: str | QType,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes back to real values: the inverse of :func:`quantize` up to rounding.

    Args:
        q: Tensor of the format's carrier dtype.
        scale: Shape ``scale_shape(q.shape, block)``.
        zero_point: Of the scale's shape: int8, uint8, int32, or real numbers; or None for 0.
        block: One entry per dimension of ``q``.
        qtype: Name of the number format.
        out_dtype: Floating point dtype of the result.

    Returns:
        Tensor of ``out_dtype`` with the shape and strides of ``q``.

    Raises:
        SpecError: if ``q`` is not of the carrier dtype or the shapes do not fit.
    """
    qt = get_qtype(qtype)
    if q.dtype != qt.carrier:
        raise SpecError(f"{qt.name} values are held in {qt.carrier}, not {q.dtype}")
    check_layout(q.shape, scale, zero_point, block)
    return _match(_values(q, scale, zero_point, block, qt).reshape(q.shape), q, out_dtype)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str | QType
) -> Tensor:
    """``dequantize(quantize(x))`` in ``x``'s dtype, bit for bit; arguments and errors as there."""
    qt = get_qtype(qtype)
    if not qt.is_int or _wide(qt):
        return dequantize(quantize(x, scale, zero_point, block, qt), scale, zero_point, block, qt, x.dtype)
    _check_float(x)
    check_layout(x.shape, scale, zero_point, block)
    # Codes are whole numbers that float32 holds exactly: no need to visit the carrier.
    y = _codes(x, scale, zero_point, block, qt)
    _, scale, zero_point = align(x, block, scale, zero_point)
    if zero_point is not None:
        y = y.sub_(zero_point)
    return _match(y.mul_(scale.to(torch.float32)).reshape(x.shape), x, x.dtype)


def in_range(x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str | QType) -> Tensor:
    """Bool tensor of ``x``'s shape: True where :func:`quantize` rounds without saturating. NaN is never in range."""
    qt = get_qtype(qtype)
    view, scale, zero_point = align(x, block, scale, zero_point)
    y = _compute(view, qt) * scale.to(torch.float32).reciprocal()
    if qt.is_int:
        if zero_point is not None and zero_point.is_floating_point():
            y = (y + zero_point).round()
        else:
            y = y.round() if zero_point is None else y.round() + zero_point
    return ((y >= qt.qmin) & (y <= qt.qmax)).reshape(x.shape)


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qt: QType) -> Tensor:
    """Codes of ``x`` before the cast to the carrier, in the split shape of :func:`align`. Never aliases ``x``."""
    x, scale, zero_point = align(x, block, scale, zero_point)
    y = _compute(x, qt) * scale.to(torch.float32).reciprocal()
    if qt.kind == "codebook":
        return _nearest(y.nan_to_num_(nan=0.0), qt)
    if qt.kind == "float":
        return y.clamp_(qt.qmin, qt.qmax)
    # NaN is 0 from here on. Adding 0.0 where there is no zero point turns -0.0 into 0.0, as a trip through int would.
    y = y.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    if zero_point is not None and zero_point.is_floating_point():
        return y.add_(zero_point).round_().clamp_(qt.qmin, qt.qmax)
    return y.round_().add_(0.0 if zero_point is None else zero_point).clamp_(qt.qmin, qt.qmax)


def _values(q: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qt: QType) -> Tensor:
    """Real values of codes in float32 (or float64), in the split shape of :func:`align`."""
    q, scale, zero_point = align(q, block, scale, zero_point)
    scale = scale.to(torch.float32)
    if qt.codebook is not None:
        return _lookup(torch.tensor(qt.codebook, dtype=torch.float32, device=q.device), q).mul_(scale)
    y = q.to(_work(qt))
    if qt.is_int and zero_point is not None:
        y = y.sub_(zero_point)
    return y.mul_(scale)


def _nearest(y: Tensor, qt: QType) -> Tensor:
    """Index into the codebook of the value nearest to each ``y`` (float32, no NaN); ties to the even index."""
    order, bounds = _search_table(qt)
    rank = torch.bucketize(y.contiguous(), torch.tensor(bounds, dtype=torch.float32, device=y.device), out_int32=True)
    return _lookup(torch.tensor(order, dtype=torch.uint8, device=y.device), rank)


def _lookup(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``, which would make a view of a 0-d index and read it on the host."""
    return table.index_select(0, index.reshape(-1).int()).reshape(index.shape)


@functools.cache
def _search_table(qt: QType) -> tuple[list[int], list[float]]:
    """Codes in ascending order of value, and the largest float32 that still belongs to each code but the last."""
    first: dict[float, int] = {}
    for code, value in enumerate(qt.codebook or ()):
        first.setdefault(value, code)  # -0.0 equals 0.0: its code is never produced
    ordered = sorted(first.items())
    bounds = []
    for (low, code), (high, _) in itertools.pairwise(ordered):
        middle = struct.unpack("f", struct.pack("f", (low + high) / 2))[0]
        bounds.append(middle if code % 2 == 0 else _below(middle))
    return [code for _, code in ordered], bounds


def _below(value: float) -> float:
    """The next smaller float32 of a non-zero float32."""
    bits = struct.unpack("i", struct.pack("f", value))[0]
    return struct.unpack("f", struct.pack("i", bits - 1 if value > 0 else bits + 1))[0]


def _wide(qt: QType) -> bool:
    return qt.is_int and qt.bits > 16


def _work(qt: QType) -> torch.dtype:
    return torch.float64 if _wide(qt) else torch.float32


def _compute(x: Tensor, qt: QType) -> Tensor:
    """``x`` such that its product with a float32 tensor is in the working dtype; halves are promoted by the product."""
    if _wide(qt):
        return x.to(torch.float64)
    return x if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x.to(torch.float32)


def _match(y: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``y`` as ``dtype`` with the strides that ``empty_like(like)`` has: what the fake implementation promises."""
    if y.stride() == like.stride():  # y is fresh and dense, so the cast keeps its strides
        return y.to(dtype)
    return torch.empty_like(like, dtype=dtype).copy_(y)


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise SpecError(f"only floating point tensors can be quantized, not {x.dtype}")


# -- scales ----------------------------------------------------------------------------------------


def affine_qparams(low: Tensor, high: Tensor, qtype: str | QType, scheme: str = "symmetric") -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover the range ``[low, high]``.

    The range is first widened to contain zero, so that zero is exact. NaN bounds count as 0, and bounds beyond half the
    largest float32 count as that half, so that every code stands for a finite value.

    * symmetric: ``scale = max(|low|, |high|) / ((qmax - qmin) / 2)``, the zero point is the middle of the code range (0
      for signed formats, 128 for uint8). For int8 that divides by 127.5 as PyTorch's observers do, not by 127: the
      largest value may saturate, but by no more than half a step, and all 256 codes are used.
    * asymmetric: ``scale = (high - low) / (qmax - qmin)``,
      ``zero_point = clamp(qmin - round(low / scale), qmin, qmax)``.
    * ``scale_format="e8m0"``: ``scale = 2 ** (floor(log2(absmax)) - floor(log2(qmax)))`` (OCP Microscaling v1.0), at
      least 2**-126; values between ``qmax * scale`` and ``absmax`` saturate.

    Args:
        low: Smallest values, any shape.
        high: Largest values, same shape.
        qtype: Name of the number format.
        scheme: ``"symmetric"`` or ``"asymmetric"`` (integers with float32 scales only).

    Returns:
        ``(scale float32, zero_point int32)`` of the inputs' shape. The scale is positive and finite: 1 where the range
        is just zero, and never below 2**-120.

    Raises:
        SpecError: if the scheme is unknown or the format has no zero point to give.
    """
    qt = get_qtype(qtype)
    check_scheme(qt, scheme)
    low = low.to(torch.float32).nan_to_num(nan=0.0).clamp(-MAX_BOUND, 0.0)
    high = high.to(torch.float32).nan_to_num(nan=0.0).clamp(0.0, MAX_BOUND)
    steps = float(qt.qmax) - float(qt.qmin)
    absmax = torch.maximum(-low, high)
    if scheme == "asymmetric":
        scale = (high - low) / steps
    elif qt.scale_format == "e8m0":
        scale = _power_of_two_scale(absmax, qt)
    else:
        scale = absmax / (steps / 2)
    floor = 2.0**-126 if qt.scale_format == "e8m0" else MIN_SCALE
    scale = torch.where(absmax == 0, torch.ones_like(scale), scale.clamp(min=floor))
    if scheme == "asymmetric":
        offset = qt.qmin - torch.round(low / scale).to(_work(qt))
        zero_point = offset.clamp(qt.qmin, qt.qmax).to(torch.int32)
    else:
        zero_point = torch.full_like(scale, _middle(qt), dtype=torch.int32)
    return scale, zero_point


def choose_qparams(
    x: Tensor, block: Sequence[int], qtype: str | QType, method: str = "symmetric"
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a tensor from its own smallest and largest values.

    Args:
        x: Floating point tensor.
        block: One entry per dimension of ``x``.
        qtype: Name of the number format.
        method: ``"symmetric"`` or ``"asymmetric"``; see :func:`affine_qparams`.

    Returns:
        ``(scale float32, zero_point int32)``, both of shape ``scale_shape(x.shape, block)`` and contiguous. A block
        with NaN or an infinity in it has no range: its scale is NaN, so that all it is dequantized to is NaN, and its
        zero point that of a block of zeros.

    Raises:
        SpecError: if ``x`` is not floating point or ``method`` does not suit the format.
    """
    _check_float(x)
    check_scheme(get_qtype(qtype), method)
    low, high = block_range(x, block)  # NaN spreads
    good = low.isfinite() & high.isfinite()
    scale, zero_point = affine_qparams(low.where(good, 0.0), high.where(good, 0.0), qtype, method)
    return scale.where(good, math.nan).contiguous(), zero_point.contiguous()


def check_scheme(qt: QType, scheme: str) -> None:
    """Raise :class:`SpecError` unless ``scheme`` is known and the format can follow it."""
    if scheme not in SCHEMES:
        raise SpecError(f"method must be one of {', '.join(SCHEMES)}, not {scheme!r}")
    if scheme == "asymmetric" and (not qt.is_int or qt.scale_format != "float32"):
        raise SpecError(f"{qt.name} has no zero point, so only 'symmetric' is possible")


def _middle(qt: QType) -> int:
    return (int(qt.qmin) + int(qt.qmax) + 1) // 2 if qt.is_int else 0


def _power_of_two_scale(absmax: Tensor, qt: QType) -> Tensor:
    # Exponents straight from the bits: log2 and pow round, and a scale that is off by one ulp is not a power of two.
    exponent = (absmax.contiguous().view(torch.int32) >> 23) - 127 - math.frexp(qt.qmax)[1] + 1
    return ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32)
