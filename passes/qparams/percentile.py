"""The range leaves out a fixed share of the values at its ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inc_graph.calibrate import State
from inc_graph.errors import ConfigError
from inc_graph.passes.qparams._histogram import Histogram, bins_of
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec

__all__ = ["Percentile"]


@ALGORITHMS.register("percentile")
@dataclass(frozen=True)
class Percentile(Histogram):
    """Quantiles of everything seen, zeros included; the order of the batches does not matter.

    Asymmetric: at most ``100 - percent`` percent of the values lie above the range, and as many below it. Symmetric: at
    most ``100 - percent`` percent of the magnitudes lie above it. 100 is the full range. (Wu et al., "Integer
    quantization for deep learning inference", 2020, section 3.4, compares the choice of percentages.) Exact up to the
    width of one bin, by which the range is rather too wide.

    Attributes:
        percent: Above 50, at most 100.
    """

    name: ClassVar[str] = "percentile"
    percent: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 < self.percent <= 100:
            raise ConfigError(f"percent must be above 50 and at most 100, not {self.percent!r}")

    def limits(self, state: State, qspec: QSpec) -> tuple[Tensor, Tensor]:
        bins = bins_of(state)
        n = bins.counts.shape[1] // 2
        # from zero outwards, for either side: how many values, and where the bins end
        negative, positive = bins.counts[:, :n].flip(1), bins.counts[:, n:]
        edges = torch.arange(1, n + 1, dtype=torch.float64, device=positive.device) * bins.width
        allowed = (bins.counts.sum(1) + bins.zeros) * (1 - self.percent / 100)
        if qspec.scheme == "symmetric":
            high = torch.minimum(_end(negative + positive, edges, allowed), torch.maximum(-bins.low, bins.high))
            low = -high
        else:
            high = torch.minimum(_end(positive, edges, allowed), bins.high.clamp(min=0))
            low = -torch.minimum(_end(negative, edges, allowed), -bins.low.clamp(max=0))
        return bins.restore(low, state["min"]), bins.restore(high, state["max"])


def _end(counts: Tensor, edges: Tensor, allowed: Tensor) -> Tensor:
    """The least edge beyond which there are at most `allowed` values; 0 if there are no more than that in all."""
    beyond = counts.flip(1).cumsum(1).flip(1)  # values from bin i on
    last = (beyond > allowed[:, None]).sum(1)  # so many bins are needed
    return torch.cat([edges.new_zeros(1), edges])[last]
