"""The fake quantizer of a format, and what goes on from it after training.

What was trained for a value goes on as a `TrainedObserver`, which an observed graph takes for one that has seen data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inc_graph.calibrate import Observer
from inc_graph.fake_quantizer import FakeQuantizer, OwnScale, Scale, TrackedRange
from inc_graph.learned_step import LearnedStep
from inc_graph.spec import QSpec

__all__ = ["TRAINED", "TrainedObserver", "quantizer_for"]

TRAINED = "inc_trained"  # in `gm.meta`: {name of a layer: (scale, zero point) that were learned for its weight}


def quantizer_for(
    spec: QSpec, algorithm: str, weight: Tensor | None, path: str, learn_scales: bool, freeze_after: int | None,
    check: bool,
) -> FakeQuantizer:  # fmt: skip
    """The fake quantizer of a weight, or of an input (`weight` None).

    Raises:
        ConfigError: this format, or this algorithm, cannot be trained for.
    """
    what = "input" if weight is None else "weight"
    learned = learn_scales and not spec.dynamic and spec.type.scale_format == "float32"
    if learned and (weight is None or algorithm == "minmax"):
        return LearnedStep(spec, what, path, check, weight)
    if weight is None and not spec.dynamic:
        return TrackedRange(spec, what, path, check, freeze_after)
    return OwnScale(spec, what, path, check, algorithm)


class TrainedObserver(Observer):
    """What training has found, as an observer that has seen data.

    Args:
        scale, zero_point: Of one value.
        seen: Batches that they are from; 0 where there were none.
    """

    def __init__(self, qspec: QSpec, scale: Scale, seen: int, node: str = "", module: str = "") -> None:
        super().__init__("minmax", qspec, node, module)
        self.enabled = False
        self.calls = self.elements = seen
        self.scale = scale

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point) of training."""
        self._need_data()
        scale, zero = (None if t is None else t.detach().clone().reshape(1) for t in self.scale)
        assert scale is not None
        return scale.float(), torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero
