"""The range whose quantized distribution tells the most about the real one (entropy calibration).

S. Migacz, "8-bit inference with TensorRT", GTC 2017. For a threshold T let P be the histogram of the values within [-T,
T], with what is outside added to the outermost bins, and let Q be the same histogram, without what is outside, as it
looks after quantization: the mass of each quantization level is spread evenly over the bins of that level that hold
values. T is chosen to minimize the divergence KL(P || Q). A small T costs through the clipped mass, which Q does not
have in its outermost bins; a large T through the coarse levels.

The levels here are those of the number format itself (scale and zero point of the range, cut to the extrema of the
data), which for signed 8-bit symmetric data gives the published 128 levels of magnitude and serves any other format as
well. Exact zeros take no part, as bin 0 of the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inc_graph.calibrate import State
from inc_graph.errors import ConfigError
from inc_graph.numerics import affine_qparams
from inc_graph.passes.qparams._histogram import Bins, Histogram, bins_of
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec

__all__ = ["KL"]

_THRESHOLDS = 128
_SMOOTH = 1e-6  # Q where it is zero and P is not, relative to the whole mass


@ALGORITHMS.register("kl")
@dataclass(frozen=True)
class KL(Histogram):
    """Least divergence between the distributions before and after. The order of the batches does not matter.

    At most 128 thresholds are tried, the full range among them. Formats with more levels than the histogram has bins
    get the full range, since there is no coarseness to trade for.
    """

    name: ClassVar[str] = "kl"

    def limits(self, state: State, qspec: QSpec) -> tuple[Tensor, Tensor]:
        if not qspec.type.is_int:
            raise ConfigError(f"kl works for integer formats, not {qspec.qtype}")
        bins = bins_of(state)
        best = [_threshold(bins, row, qspec) for row in range(len(bins.counts))]
        top = torch.stack(best)
        low, high = torch.maximum(bins.low, -top), torch.minimum(bins.high, top)
        return bins.restore(low, state["min"]), bins.restore(high, state["max"])


def _threshold(bins: Bins, row: int, qspec: QSpec) -> Tensor:
    """The best threshold of one histogram, a float64 scalar in the units of `bins`."""
    n = bins.counts.shape[1] // 2
    low, high = bins.low[row].clamp(max=0), bins.high[row].clamp(min=0)
    absmax = torch.maximum(-low, high)
    levels = int(qspec.type.qmax) - int(qspec.type.qmin) + 1
    extent = [int(end / bins.width) + 1 if end > 0 else 0 for end in (-low, high)]  # bins with data on either side
    last, first = max(extent), (levels + 1) // 2
    if qspec.scheme == "asymmetric":  # the levels cover the data's side of the window only
        first = max(first, levels - min(extent))
    if first >= last:  # with fewer bins than levels there is no coarseness to see
        return absmax
    kept = torch.linspace(
        first, last, min(_THRESHOLDS, last - first + 1), dtype=torch.float32, device=low.device
    ).long()  # bins per side
    top = torch.minimum(kept * bins.width, absmax)

    counts, values = (  # [2, last], from zero outwards
        torch.stack([t[row, :n].flip(0)[:last], t[row, n : n + last]]) for t in (bins.counts, bins.values)
    )
    filled = counts > 0
    bin_of, inner = filled.nonzero()[:, 1], counts[filled]  # [m]: bins that hold no value say nothing, unless they are
    column = len(inner) + torch.arange(2, device=low.device)[:, None].repeat(
        1, last
    )  # outermost: two columns for these
    column[filled] = torch.arange(len(inner), device=low.device)
    inner = inner * (bin_of < kept[:, None])  # [k, m]
    outer = (counts.sum(1, keepdim=True) - counts.cumsum(1))[:, kept - 1].T  # [k, 2]
    p = torch.cat([inner, torch.zeros_like(outer)], 1).scatter_add_(1, column[:, kept - 1].T, outer)

    scale, zero_point = affine_qparams(torch.maximum(low, -top), torch.minimum(high, top), qspec.qtype, qspec.scheme)
    codes = (values[filled] * scale.reciprocal()[:, None]).round_() + zero_point[:, None]
    codes = codes.clamp_(qspec.type.qmin, qspec.type.qmax).sub_(qspec.type.qmin).long()
    mass, cells = (torch.zeros(len(kept), levels, dtype=p.dtype, device=p.device) for _ in range(2))
    mass, cells = mass.scatter_add_(1, codes, inner), cells.scatter_add_(1, codes, (inner > 0).to(p.dtype))
    q = (mass / cells.clamp(min=1)).gather(1, codes) * (inner > 0)

    p = p / counts.sum()
    q = torch.cat([q / q.sum(1, keepdim=True).clamp(min=1), torch.zeros_like(outer)], 1).clamp(min=_SMOOTH)
    divergence = torch.where(p > 0, p * (p / q).log(), 0).sum(1)
    return top[divergence.argmin()]
