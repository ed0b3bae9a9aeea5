"""The range with the least squared quantization error, found on a histogram of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inc_graph.calibrate import State
from inc_graph.passes.qparams._histogram import Histogram, bins_of
from inc_graph.passes.qparams._search import best_range
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec

__all__ = ["HistogramMSE"]


@ALGORITHMS.register("histogram_mse")
@dataclass(frozen=True)
class HistogramMSE(Histogram):
    """Least squared error over everything seen (objective: see `_search`). The order of the batches does not matter.

    Never worse than the full range on the histogram, and as good as the histogram is fine on the data themselves.
    """

    name: ClassVar[str] = "histogram_mse"

    def limits(self, state: State, qspec: QSpec) -> tuple[Tensor, Tensor]:
        bins = bins_of(state)
        used = (bins.counts > 0).any(0)  # empty bins cost time and say nothing
        values, counts = bins.values[:, used], bins.counts[:, used]
        total = counts.sum(1, keepdim=True)
        shares = counts / torch.where(total > 0, total, 1)
        low, high = best_range(values, shares, bins.low.float(), bins.high.float(), qspec)
        return bins.restore(low, state["min"]), bins.restore(high, state["max"])
