"""The range is that of all the data: nothing is clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inc_graph.calibrate import RangeEstimator, State
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec

__all__ = ["MinMax"]


@ALGORITHMS.register("minmax")
@dataclass(frozen=True)
class MinMax(RangeEstimator):
    """Least and greatest value seen. One pass over the data; the order of the batches does not matter."""

    name: ClassVar[str] = "minmax"

    def update(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        return {**state, "min": torch.minimum(state["min"], low), "max": torch.maximum(state["max"], high)}

    def limits(self, state: State, qspec: QSpec) -> tuple[Tensor, Tensor]:
        return state["min"], state["max"]
