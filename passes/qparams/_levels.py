"""The levels of a number format, and the rounding of rows of weights to them.

A level is what is multiplied by the scale: `value = level * scale`. For integers it is the code less the zero point,
for codebooks and floats the entry or number itself. The scale is divided by, not multiplied by its reciprocal: that is
one rounding less, and what other implementations of round-to-nearest do, so codes are comparable one by one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_graph.errors import ConfigError
from inc_graph.numerics import MAX_BOUND, MIN_SCALE
from inc_graph.qtypes import QType
from inc_graph.spec import QSpec
from inc_graph.weights import narrow_zero_point

__all__ = ["Levels", "levels_of"]

_MOST_BITS = 8


@dataclass(frozen=True)
class Levels:
    """Levels of a format under a scheme.

    Attributes:
        qtype: The number format.
        asymmetric: Whether each group has a zero point of its own.
        middle: The code of level 0 where the scheme is symmetric.
    """

    qtype: QType
    asymmetric: bool
    middle: int

    @property
    def low(self) -> float:
        """The least level of a symmetric scheme."""
        return float(self.qtype.qmin) - self.middle

    @property
    def high(self) -> float:
        """The greatest level of a symmetric scheme."""
        return float(self.qtype.qmax) - self.middle

    @property
    def lopsided(self) -> bool:
        """Whether there is one level more on the negative side, so that the sign of the scale matters."""
        return self.qtype.is_int and not self.asymmetric and -self.low > self.high

    def full_range(self, rows: Tensor, full: bool = False) -> tuple[Tensor, Tensor | None]:
        """The scale that clips nothing (float32 ``[rows, 1]``), and the zero point (float32, whole) or None.

        Args:
            rows: float32 ``[rows, elements]``.
            full: Let the greatest magnitude have the lowest level, where there is one level more on that side. The
                scale is negative where that magnitude belongs to a positive number.
        """
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        low, high = low.clamp(-MAX_BOUND, 0), high.clamp(0, MAX_BOUND)
        if self.asymmetric:
            scale = _usable((high - low) / (float(self.qtype.qmax) - float(self.qtype.qmin)))
            return scale, (self.qtype.qmin - torch.round(low / scale)).clamp_(self.qtype.qmin, self.qtype.qmax)
        top = torch.maximum(-low, high)
        if full and self.lopsided:
            scale = _usable(top / -self.low)
            return torch.where(high > -low, -scale, scale), None
        return _usable(top / self.high), None

    def nearest(self, rows: Tensor, scale: Tensor, zero_point: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The level nearest to each of ``rows / scale``, float32."""
        out = torch.div(rows, scale, out=out)
        if self.qtype.codebook is not None:
            values, middles = _steps(self.qtype.codebook)
            return _staircase(out, middles, values)
        if not self.qtype.is_int:
            return out.clamp_(self.low, self.high).to(self.qtype.carrier).float()
        out.round_()
        if zero_point is None:
            return out.clamp_(self.low, self.high)
        return out.clamp_(self.qtype.qmin - zero_point, self.qtype.qmax - zero_point)

    def encode(self, levels: Tensor, zero_point: Tensor | None) -> Tensor:
        """Levels (which are changed) to codes in the carrier dtype."""
        if self.qtype.codebook is not None:
            return _codebook_codes(levels, self.qtype)
        if zero_point is not None:
            levels.add_(zero_point)
        elif self.middle:
            levels.add_(self.middle)
        return levels.to(self.qtype.carrier)

    def zero_point(self, zero: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """The zero point to keep, of integer dtype and that shape, from that of each group; None if it is 0."""
        if zero is not None:
            return narrow_zero_point(zero.reshape(shape))
        return narrow_zero_point(torch.full(shape, float(self.middle), device=device)) if self.middle else None


def levels_of(spec: QSpec) -> Levels:
    """The levels of a weight format. ConfigError if weights are not rounded to that format."""
    qtype = spec.type
    if qtype.scale_format != "float32" or qtype.bits > _MOST_BITS:
        raise ConfigError(
            f"weights are not quantized to {qtype.name} by this algorithm",
            hint="integers of 2 to 8 bits, nf4, fp4, fp4_bnb, fp8_e4m3 and fp8_e5m2 are possible",
        )
    symmetric = spec.scheme == "symmetric"
    middle = (int(qtype.qmin) + int(qtype.qmax) + 1) // 2 if qtype.is_int and symmetric else 0
    return Levels(qtype, not symmetric, middle)


def _usable(scale: Tensor) -> Tensor:
    """1 where the range is just zero, and never so small that a division overflows."""
    return torch.where(scale == 0, 1.0, scale.clamp_(min=MIN_SCALE))


def _steps(codebook: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """Values in ascending order, and the middles between neighbours."""
    values = sorted(set(codebook))
    return values, [(a + b) / 2 for a, b in itertools.pairwise(values)]


def _staircase(x: Tensor, steps: list[float], heights: list[float]) -> Tensor:
    """``heights[k]`` for the x that are above k of the steps. One comparison per step, the result of which is a float,
    is six times as fast as a binary search in a table of 16.
    """
    found, above = torch.full_like(x, heights[0]), torch.empty_like(x)
    for step, (a, b) in zip(steps, itertools.pairwise(heights), strict=True):
        found.add_(torch.gt(x, step, out=above), alpha=b - a)
    return found


def _codebook_codes(x: Tensor, qtype: QType) -> Tensor:
    """Codes of the nearest values; of two that are equally near, the lower. Of -0.0 and 0.0 the latter."""
    codebook = qtype.codebook or ()
    values, middles = _steps(codebook)
    return _staircase(x, middles, [codebook.index(v) for v in values]).to(qtype.carrier)
