"""Scales with little squared error, found for each group: the range search of the weight algorithms.

For given levels `k` the best scale is known, `sum(d x k) / sum(d k k)` with `d` the weights of the elements. So a
candidate is a scale to find levels with, and what is kept is the scale that suits those levels best: a few candidates
do then what a fine grid of scales would do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inc_graph.passes.qparams._levels import Levels

__all__ = ["better_of", "fits_half", "least_error", "stored"]

Params = tuple[Tensor, Tensor | None]

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.66, 0.56)  # of the full range; few bits want strong clipping
_SHARES_MANY_BITS = (1.0, 0.98, 0.95, 0.9)
_HALF = torch.finfo(torch.float16)


def fits_half(scale: Tensor) -> bool:
    """Whether all scales can be kept as float16: the condition of `weights.narrow_scale`."""
    low, high = scale.abs().aminmax()
    return float(low) >= _HALF.tiny and float(high) <= _HALF.max


def stored(scale: Tensor) -> Tensor:
    """The scale as float16 holds it, in float32; itself where float16 cannot hold it."""
    size = scale.abs()
    return torch.where((size >= _HALF.tiny) & (size <= _HALF.max), scale.half().float(), scale)


def least_error(rows: Tensor, levels: Levels, weights: Tensor | None = None) -> Params:
    """Scale (float32 ``[rows, 1]``, of float16's precision) and zero point (float32, whole, or None) of each row.

    Args:
        rows: float32 ``[rows, elements]``, few enough to stay in the cache.
        levels: What to round to.
        weights: Of the squared errors, float32 ``[elements]`` or as `rows`; None: all alike.
    """
    search = _Search(rows, levels, weights)
    # negative where only that gives the lowest level to the longer side
    start, zero = levels.full_range(rows, full=True)
    many = levels.qtype.bits > 6
    for share in _SHARES_MANY_BITS if many else _SHARES:
        search.offer(start * share, zero)
    for _ in range(1 if many else 2):
        search.offer(search.scale, search.zero)
        if search.zero is not None:  # the range of an asymmetric group may want to move as well
            for step in (-1.0, 1.0):
                moved = (search.zero + step).clamp_(levels.qtype.qmin, levels.qtype.qmax)
                search.offer(search.scale, moved)
    return search.scale, search.zero


def better_of(
    rows: Tensor, levels: Levels, found: Params, plain: Params, weights: Tensor | None = None, half: bool = True
) -> Params:
    """Row by row the parameters with the lesser squared error, `plain` where they are equal.

    Args:
        rows, levels, weights: As for `least_error`.
        found, plain: What to choose from.
        half: Levels are multiplied by scales in float16 precision, which `plain` is not made for.
    """
    errors = []
    for scale, zero in (found, plain):
        error = levels.nearest(rows, scale, zero).mul_(stored(scale) if half else scale).sub_(rows).square_()
        errors.append((error if weights is None else error.mul_(weights)).sum(1, keepdim=True))
    better = errors[0] < errors[1]
    (scale, zero), (plain_scale, plain_zero) = found, plain
    if zero is not None and plain_zero is not None:
        zero = torch.where(better, zero, plain_zero)
    return torch.where(better, scale, plain_scale), zero


class _Search:
    """The best scale so far of each row, and memory to work in."""

    def __init__(self, rows: Tensor, levels: Levels, weights: Tensor | None) -> None:
        self.rows, self.levels, self.weights = rows, levels, weights
        self.weighted = rows if weights is None else rows * weights
        self.energy = (self.weighted * rows).sum(1, keepdim=True)
        self.work = torch.empty_like(rows), torch.empty_like(rows)
        self.error = torch.full_like(self.energy, torch.inf)
        self.scale = torch.ones_like(self.energy)
        self.zero: Tensor | None = torch.zeros_like(self.energy) if levels.asymmetric else None

    def offer(self, scale: Tensor, zero: Tensor | None) -> None:
        """Find levels with a scale; keep the scale that fits them best if its error is the least so far."""
        k = self.levels.nearest(self.rows, scale, zero, self.work[0])
        along = torch.mul(self.weighted, k, out=self.work[1]).sum(1, keepdim=True)
        weighted = k if self.weights is None else torch.mul(k, self.weights, out=self.work[1])
        square = torch.mul(weighted, k, out=self.work[1]).sum(1, keepdim=True)
        fitted = along / square
        fitted = torch.where(fitted.isfinite() & (fitted != 0), stored(fitted), scale)
        error = self.energy + fitted * (fitted * square - 2 * along)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, fitted, self.scale)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)
