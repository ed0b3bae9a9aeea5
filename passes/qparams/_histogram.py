"""A histogram that grows with its data, exactly: the common part of the histogram estimators.

Each block (tensor or channel) has `n` bins on either side of zero, of equal width `2**e` and mirrored: bin `n + k`
counts the values in `[k 2**e, (k + 1) 2**e)` and bin `n - 1 - k` those in `(-(k + 1) 2**e, -k 2**e]`. `e` is the least
exponent for which the block's greatest magnitude surely fits, so half of the bins of one side at least are in use. A
batch that does not fit raises `e`; bins then fall together two by two, and since `floor(floor(x) / 2) = floor(x / 2)`
the counts are what they would have been with the wider bins from the start. So order and grouping of the batches make
no difference at all: `collect(a ++ b)` equals `merge(collect(a), collect(b))` bin for bin.

Exact zeros, which any range represents without error, are counted apart (half of the values after a relu are zeros).
The exact extrema are kept as well, so a clamp value such as the 6 of relu6, the inner edge of its bin and the greatest
value, is known exactly.
"""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_graph.calibrate import RangeEstimator, State, blocks
from inc_graph.errors import CalibrationError, ConfigError
from inc_graph.spec import QSpec

__all__ = ["Bins", "Histogram", "bins_of", "power_of_two"]

_EMPTY = -1100  # the exponent of a block that has seen nothing but zeros: below that of any float
_CHUNK = 1 << 24  # torch.histc counts in the dtype of its input, and float32 counts to 2**24


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent as float64, exactly (pow and ldexp may round), for int64 exponents from -1022 to 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


@dataclass(frozen=True, kw_only=True)
class Histogram(RangeEstimator, ABC):
    """Base of the estimators that keep a histogram (and the exact extrema).

    Attributes:
        bins: Bins on either side of zero, a power of two. The state takes 16 bytes a bin and block.
    """

    bins: int = 2048

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int) or not 16 <= self.bins <= 1 << 20 or self.bins & (self.bins - 1):
            raise ConfigError(f"bins must be a power of two from 16 to {1 << 20}, not {self.bins!r}")

    def init(self, qspec: QSpec, ndim: int) -> State:
        return {
            **super().init(qspec, ndim),
            "counts": torch.zeros(1, 2 * self.bins, dtype=torch.int64),
            "zeros": torch.zeros(1, dtype=torch.int64),
            "exponent": torch.full((1,), _EMPTY),
        }

    def update(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        exponent = torch.maximum(state["exponent"], self._exponent(torch.maximum(-low, high).flatten()))
        signs = bool(low.min() < 0), bool(high.max() > 0)
        counts, zeros = _count(x, state["block"].tolist(), exponent, self.bins, signs)
        return {
            **state,
            "min": torch.minimum(state["min"], low),
            "max": torch.maximum(state["max"], high),
            "counts": _widen(state["counts"], exponent - state["exponent"]) + counts,
            "zeros": state["zeros"] + zeros,
            "exponent": exponent,
        }

    def merge(self, a: State, b: State) -> State:
        if a["counts"].shape[1] != b["counts"].shape[1]:
            raise CalibrationError(f"histograms of {a['counts'].shape[1]} and {b['counts'].shape[1]} bins do not merge")
        exponent = torch.maximum(a["exponent"], b["exponent"])
        counts = [_widen(s["counts"], exponent - s["exponent"]) for s in (a, b)]
        return {
            **super().merge(a, b),
            "counts": counts[0] + counts[1],
            "zeros": a["zeros"] + b["zeros"],
            "exponent": exponent,
        }

    def _exponent(self, absmax: Tensor) -> Tensor:
        """Least e with `absmax < bins * 2**e`, per block."""
        e = torch.frexp(absmax.double())[1].long() - (self.bins.bit_length() - 1)
        return torch.where(absmax == 0, _EMPTY, e)


def _widen(counts: Tensor, shift: Tensor) -> Tensor:
    """Counts ``[rows, 2n]`` after widening the bins of row r by ``2**shift[r]``."""
    if not bool(shift.any()):
        return counts
    rows, n = max(len(shift), len(counts)), counts.shape[1] // 2
    outwards = torch.arange(n, device=counts.device) >> shift.clamp(max=62)[:, None]
    index = torch.cat([n - 1 - outwards.flip(1), n + outwards], 1)
    return torch.zeros(rows, 2 * n, dtype=counts.dtype, device=counts.device).scatter_add(
        1, index.expand(rows, -1), counts.expand(rows, -1)
    )


def _count(x: Tensor, block: list[int], exponent: Tensor, n: int, signs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Counts ``[rows, 2n]`` without the exact zeros, and the number of zeros ``[rows]``. `signs`: sides with data."""
    if len(exponent) == 1:
        x = x.float().reshape(-1)
        zeros = (x.numel() - torch.count_nonzero(x)).reshape(1)
        counts = torch.zeros(1, 2 * n, dtype=torch.int64, device=x.device)
        if (e := int(exponent)) > _EMPTY:
            x = x if abs(e) < 90 else x.double()  # torch.histc multiplies before it divides
            limit = math.ldexp(n, e)
            for part in x.split(_CHUNK):  # from zero outwards, where powers of two make the bin's number exact
                if signs[0]:
                    counts[0, :n] += torch.histc(-part, n, 0, limit).long().flip(0)
                if signs[1]:
                    counts[0, n:] += torch.histc(part, n, 0, limit).long()
            counts[0, n - 1] -= zeros[0] * signs[0]
            counts[0, n] -= zeros[0] * signs[1]
        return counts, zeros
    x = blocks(x, block)
    is_zero = x == 0
    # a product with a power of two is exact, in float64 for the whole range of float32
    index = (x.abs().double() * power_of_two(-exponent.clamp(min=-1000))[:, None]).long()
    index = torch.where(x < 0, n - 1 - index, n + index)
    index += torch.arange(len(x), device=x.device)[:, None] * (2 * n)
    counts = torch.bincount(index[~is_zero], minlength=len(x) * 2 * n).reshape(len(x), 2 * n)
    return counts, is_zero.sum(1)


@dataclass(frozen=True)
class Bins:
    """A histogram ready to be worked on, in units of ``2**unit`` so that magnitudes are below 2. One row a block.

    Attributes:
        values: Representative of each bin, float32 ``[rows, m]``, ascending: its centre, kept within the extrema.
        counts: float64 ``[rows, m]``.
        zeros: float64 ``[rows]``: exact zeros, which are in no bin.
        width: Width of a bin, a float.
        low, high: Exact extrema, float64 ``[rows]``.
        unit: int64 ``[rows]``.
    """

    values: Tensor
    counts: Tensor
    zeros: Tensor
    width: float
    low: Tensor
    high: Tensor
    unit: Tensor

    def restore(self, limit: Tensor, like: Tensor) -> Tensor:
        """A limit ``[rows]`` back in the units of the data, in the shape of `like`."""
        return (limit.double() * power_of_two(self.unit)).float().reshape(like.shape)


def bins_of(state: State) -> Bins:
    """The histogram of a state that has seen data."""
    counts, n = state["counts"], state["counts"].shape[1] // 2
    log = n.bit_length() - 1
    unit = torch.where(state["exponent"] == _EMPTY, 0, state["exponent"] + log)
    low, high = (state[key].flatten().double() * power_of_two(-unit) for key in ("min", "max"))
    width = 2.0**-log
    centres = (torch.arange(-n, n, device=counts.device, dtype=torch.float32) + 0.5) * width
    values = torch.minimum(torch.maximum(centres, low.float()[:, None]), high.float()[:, None])
    return Bins(values, counts.double(), state["zeros"].double(), width, low, high, unit)
