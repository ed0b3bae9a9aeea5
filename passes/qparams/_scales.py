"""Parameters of a group of columns: what `gptq` finds when the turn of a group comes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_graph.errors import ConfigError
from inc_graph.passes.qparams._groups import chunks
from inc_graph.passes.qparams._histogram import power_of_two
from inc_graph.passes.qparams._levels import Levels
from inc_graph.passes.qparams._refine import better_of, least_error, stored

__all__ = ["Fp8Window", "group_params"]

_FP8_MAX, _FP8_LEAST = 448.0, -9  # e4m3: the greatest number, and the exponent of the least
_FP8_DIGITS = 4  # a whole number of so many binary digits, times a power of two, is a number of fp8 e4m3


@dataclass(frozen=True)
class Fp8Window:
    """Exponents of scales for which every level times scale is a number of fp8 e4m3 over a common power of two.

    Attributes:
        least, most: Of the exponents.
        scale: The common power of two.
    """

    least: int
    most: int
    scale: float

    @staticmethod
    def of(weight: Tensor, levels: Levels) -> Fp8Window:
        """The window whose upper end lets the greatest weight not be clipped. ConfigError if levels are not exact."""
        qtype = levels.qtype
        if not qtype.is_int or qtype.bits > _FP8_DIGITS:
            raise ConfigError(
                f"fp8_aware needs integers of at most {_FP8_DIGITS} bits, not {qtype.name}", hint="use int4, or drop it"
            )
        longest = float(qtype.qmax) - float(qtype.qmin) if levels.asymmetric else -levels.low
        low, high = weight.min().clamp(max=0), weight.max().clamp(min=0)
        reach = float(high - low if levels.asymmetric else torch.maximum(-low, high))
        room = math.floor(math.log2(_FP8_MAX / longest))
        most = math.ceil(math.log2(reach / longest)) if reach else 0
        return Fp8Window(most - room + _FP8_LEAST, most, 2.0 ** (most - room))

    def nearest(self, scale: Tensor, step: int) -> Tensor:
        """Powers of two in the window: the next below the scale (step 0) or above it (step 1), float32."""
        exponent = torch.floor(torch.log2(scale.abs().double())).long() + step
        return power_of_two(exponent.clamp(self.least, self.most)).float()


def group_params(
    columns: Tensor, levels: Levels, importance: Tensor | None, window: Fp8Window | None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (float32, ``[out]``) of a group from its weights ``[columns, out]``.

    Args:
        columns: float32.
        levels: What will be rounded to.
        importance: Of the errors of each column, for the scales of least error; None: those of the full range.
        window: Only powers of two in there, the better neighbour; or None.
    """
    rows = columns.T.contiguous()
    scale = rows.new_empty(len(rows), 1)
    zero = torch.empty_like(scale) if levels.asymmetric else None
    for part in chunks(rows):
        x = rows[part]
        s, z = levels.full_range(x, full=True)
        if importance is not None:
            s, z = better_of(x, levels, least_error(x, levels, importance), (s, z), importance)
        if window is not None:
            below, above = (_shifted(x, levels, window.nearest(s, step)) for step in (0, 1))
            s, z = better_of(x, levels, below, above, importance, half=False)
        scale[part] = stored(s)
        if zero is not None:
            zero[part] = z
    return scale[:, 0], None if zero is None else zero[:, 0]


def _shifted(rows: Tensor, levels: Levels, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """A scale with the zero point that puts the range in the middle of the codes."""
    if not levels.asymmetric:
        return scale, None
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    middle = (float(levels.qtype.qmin) + float(levels.qtype.qmax)) / 2
    zero = torch.round(middle - (low + high) / 2 / scale)
    return scale, zero.clamp_(levels.qtype.qmin, levels.qtype.qmax)
