"""The range with the least squared quantization error of one known tensor: for weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inc_graph.calibrate import RangeEstimator, State, blocks
from inc_graph.errors import CalibrationError
from inc_graph.passes.qparams._histogram import power_of_two
from inc_graph.passes.qparams._search import best_range
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec

__all__ = ["MSE"]

_HINT = "use histogram_mse for activations"


@ALGORITHMS.register("mse")
@dataclass(frozen=True)
class MSE(RangeEstimator):
    """Like histogram_mse, but on the values themselves: exact, and fast for many channels. The state holds the tensor,
    so there can be only one: a second batch is a CalibrationError.
    """

    name: ClassVar[str] = "mse"
    batches: ClassVar[bool] = False

    def init(self, qspec: QSpec, ndim: int) -> State:
        return {**super().init(qspec, ndim), "values": torch.zeros(1, 0)}

    def update(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        if state["values"].numel():
            raise CalibrationError("the estimator 'mse' takes one tensor, and this is the second", hint=_HINT)
        return {**state, "min": low, "max": high, "values": blocks(x, state["block"].tolist())}

    def merge(self, a: State, b: State) -> State:
        if a["values"].numel() and b["values"].numel():
            raise CalibrationError("the estimator 'mse' takes one tensor, and these are two", hint=_HINT)
        return {**super().merge(a, b), "values": a["values"] if a["values"].numel() else b["values"]}

    def limits(self, state: State, qspec: QSpec) -> tuple[Tensor, Tensor]:
        values, low, high = state["values"], state["min"].flatten(), state["max"].flatten()
        # a power of two per row brings the magnitudes near 1, exactly
        unit = power_of_two(torch.frexp(torch.maximum(-low, high).double())[1].long())
        scaled = (values.double() / unit[:, None]).float()
        best = best_range(scaled, None, (low / unit).float(), (high / unit).float(), qspec)
        new_low, new_high = ((end * unit).float().reshape(state["min"].shape) for end in best)
        return new_low, new_high
