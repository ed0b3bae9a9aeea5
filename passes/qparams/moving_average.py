"""The range is the average of the ranges of the batches, late ones weighing more.

With `m` the momentum and `r_k` the range of batch `k` of `n`:

    range = sum_k m (1 - m)^(n - k) r_k / (1 - (1 - m)^n)

The denominator is the sum of the weights (the correction of Adam: Kingma and Ba, 2015). Without it the first batch
would keep the weight (1 - m)^(n - 1), which at the usual handful of batches is nearly all of it; with it, a few batches
give nearly their plain mean. PyTorch's moving average observer starts from the first batch and has no correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inc_graph.calibrate import RangeEstimator, State
from inc_graph.errors import ConfigError
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec

__all__ = ["MovingAverage"]


@ALGORITHMS.register("moving_average")
@dataclass(frozen=True)
class MovingAverage(RangeEstimator):
    """Average of the batches' extrema. The one estimator for which the order of the batches matters.

    Attributes:
        momentum: Weight of a new batch against all before it, in (0, 1]. 1 keeps the last batch only.
    """

    name: ClassVar[str] = "moving_average"
    momentum: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ConfigError(f"momentum must be above 0 and at most 1, not {self.momentum!r}")

    def init(self, qspec: QSpec, ndim: int) -> State:
        zero = torch.zeros((1,) * ndim, dtype=torch.float64)
        return {
            **super().init(qspec, ndim),
            "sum_min": zero,
            "sum_max": zero,
            "weight": torch.zeros((), dtype=torch.float64),  # sum of the weights
            "decay": torch.ones((), dtype=torch.float64),  # (1 - m)^n
        }

    def update(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        m = self.momentum
        batch = {
            "block": state["block"],
            "min": low,
            "max": high,
            "sum_min": low.double() * m,
            "sum_max": high.double() * m,
            "weight": torch.full_like(state["weight"], m),
            "decay": torch.full_like(state["decay"], 1 - m),
        }
        return self.merge(state, batch)

    def merge(self, a: State, b: State) -> State:
        sums = {key: a[key] * b["decay"] + b[key] for key in ("sum_min", "sum_max", "weight")}
        return {**super().merge(a, b), **sums, "decay": a["decay"] * b["decay"]}

    def limits(self, state: State, qspec: QSpec) -> tuple[Tensor, Tensor]:
        low, high = state["sum_min"] / state["weight"], state["sum_max"] / state["weight"]
        return low.float(), high.float()
