"""A tensor that is known now, quantized: the weight of a layer, or a parameter that is read like an activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inc_graph.numerics import dequantize, quantize
from inc_graph.options import make_estimator
from inc_graph.spec import QSpec

__all__ = ["Codes", "codes_of_weight"]


@dataclass(frozen=True)
class Codes:
    """Codes with what they mean. `zero_point` is None where it is 0 everywhere."""

    carrier: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QSpec

    @classmethod
    def of(cls, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QSpec) -> Codes:
        """Quantize `x`; scale and zero point as `RangeEstimator.solve` gives them."""
        zero = zero_point if needs_zero_point(spec, zero_point) else None
        with torch.no_grad():
            return cls(quantize(x.detach(), scale, zero, spec.block(x.ndim), spec.qtype), scale, zero, spec)

    def values(self) -> Tensor:
        """The real values that the codes stand for, float32."""
        block = self.spec.block(self.carrier.ndim)
        return dequantize(self.carrier, self.scale, self.zero_point, block, self.spec.qtype, torch.float32)


def codes_of_weight(weight: Tensor, annotation: Mapping[str, Any]) -> Codes:
    """Quantize a weight as its layer's annotation `{spec, algorithm}` says."""
    spec = QSpec.from_json(annotation["spec"])
    weight = weight.detach()
    scale, zero_point = make_estimator(annotation["algorithm"]).estimate(weight, spec)
    return Codes.of(weight, scale, zero_point, spec)


def needs_zero_point(spec: QSpec, zero_point: Tensor) -> bool:
    """Symmetric codes have none, but for unsigned ones, whose zero is the middle of their range."""
    return spec.scheme == "asymmetric" or bool((zero_point != 0).any())
