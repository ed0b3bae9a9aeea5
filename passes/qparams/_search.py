"""Search for the range with the least squared quantization error: the common part of the MSE estimators.

The objective of a range is the error it really causes: the values are quantized and dequantized with the scale and zero
point that the range would get, rounding and clipping included, `sum_i w_i (x_i - dq(q(x_i)))**2`. (Choosing the clip
that minimizes the L2 error: Banner et al., 2019; Nagel et al., "A white paper on neural network quantization", 2021,
section 3.1.)

Ranges are tried as multiples of the extrema, on a geometric grid that is then refined around its best point three
times. Asymmetric ranges move both ends at once. The full range is always among the candidates, so the result is never
worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inc_graph.numerics import affine_qparams, fake_quantize
from inc_graph.spec import QSpec

__all__ = ["best_range", "range_error"]

_BUDGET = 1 << 20  # elements of a temporary; more than fits the cache is slower
_REFINE = torch.linspace(-1, 1, 9)
_LARGEST = 1.02  # zero points are rounded, which shifts the range: a little more than the extrema can be better


def range_error(
    values: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, qspec: QSpec, *, exact: bool = False
) -> Tensor:
    """Squared error of candidate ranges.

    Args:
        values: float32 ``[rows, m]``.
        weights: How often each value occurs ``[rows, m]``; None: once.
        low, high: Candidates, float32 ``[rows, k]``.
        qspec: The number format; its granularity does not matter.
        exact: Sum in float64.

    Returns:
        ``[rows, k]``, float32 or float64.
    """
    scale, zero_point = affine_qparams(low, high, qspec.qtype, qspec.scheme)
    rows, m = values.shape
    per_row = max(1, _BUDGET // max(m, 1))
    dtype = torch.float64 if exact else torch.float32
    out = torch.empty(scale.shape, dtype=dtype, device=values.device)
    weights = None if weights is None else weights.to(dtype)[:, :, None]
    step = max(1, per_row // scale.shape[1])  # rows at a time
    for r in range(0, rows, step):
        v = values[r : r + step, None, :]
        for k in range(0, scale.shape[1], per_row):
            s, z = scale[r : r + step, k : k + per_row, None], zero_point[r : r + step, k : k + per_row, None]
            error = _fake_quantize(v, s, z, qspec).sub_(v).to(dtype).square_()
            total = error.sum(-1) if weights is None else torch.bmm(error, weights[r : r + step])[..., 0]
            out[r : r + step, k : k + per_row] = total
    return out


def _fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor, qspec: QSpec) -> Tensor:
    """``numerics.fake_quantize`` of ``[rows, 1, m]`` with ``[rows, k, 1]`` scales, by a shorter way for integers."""
    qt = qspec.type
    if not qt.is_int or qt.bits > 16:
        shape = torch.broadcast_shapes(values.shape, scale.shape)
        return fake_quantize(values.expand(shape).contiguous(), scale, zero_point, (1, 1, -1), qt)
    z = zero_point.float()
    codes = (values * scale.reciprocal()).round_()
    return codes.clamp_(qt.qmin - z, qt.qmax - z).mul_(scale)


def best_range(
    values: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, qspec: QSpec
) -> tuple[Tensor, Tensor]:
    """The range with the least error for each row.

    Args:
        values, weights: As in :func:`range_error`, of magnitudes near 1 so that squares neither vanish nor overflow.
        low, high: Extrema of each row, float32 ``[rows]``.
        qspec: The number format; its granularity does not matter.

    Returns:
        (low, high), float32 ``[rows]``.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if qspec.scheme == "symmetric":
        high = torch.maximum(-low, high)
        low = torch.zeros_like(high)  # the sign of the range is of no interest
    two_sided = bool((low < 0).any()) and bool((high > 0).any())
    step, count = (0.5, 12) if two_sided else (0.25, 33)  # log2 of the ratio of neighbours; down to 1/45 and 1/256
    grid = torch.exp2(-step * torch.arange(count, device=values.device))
    best_low = best_high = torch.ones(len(low), 1, device=values.device)
    for _ in range(4):
        a, b = ((best * grid).clamp(max=_LARGEST) for best in (best_low, best_high))
        if two_sided:
            a, b = a.repeat_interleave(b.shape[1], 1), b.repeat(1, a.shape[1])  # every pair
        error = range_error(values, weights, low[:, None] * a, high[:, None] * b, qspec)
        choice = error.argmin(1, keepdim=True)
        best_low, best_high = a.gather(1, choice), b.gather(1, choice)
        grid = torch.exp2(step * _REFINE.to(values.device))
        step /= 4
    # rounding in float32 sums could let a range win that is not better
    ends = torch.stack([low, best_low[:, 0] * low], 1), torch.stack([high, best_high[:, 0] * high], 1)
    choice = range_error(values, weights, *ends, qspec, exact=True).argmin(1, keepdim=True)
    return ends[0].gather(1, choice)[:, 0], ends[1].gather(1, choice)[:, 0]
