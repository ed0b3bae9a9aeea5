"""A tensor that is known now, quantized: the weight of a layer, or a parameter that is read like an activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inc_graph.numerics import quantize
from inc_graph.options import make_algorithm
from inc_graph.spec import QSpec
from inc_graph.weights import Codes, Gram, WeightAlgorithm

__all__ = ["codes_by_range", "codes_of_weight", "needs_zero_point"]


def codes_by_range(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QSpec) -> Codes:
    """Quantize `x`; scale and zero point as `RangeEstimator.solve` gives them."""
    zero = zero_point if needs_zero_point(spec, zero_point) else None
    with torch.no_grad():
        return Codes(quantize(x.detach(), scale, zero, spec.block(x.ndim), spec.qtype), scale, zero, spec)


def codes_of_weight(weight: Tensor, annotation: Mapping[str, Any], gram: Gram | None = None) -> Codes:
    """Quantize a weight as its layer's annotation `{spec, algorithm}` says.

    Args:
        weight: Finite, any float dtype.
        annotation: Of the layer.
        gram: Of the layer's inputs, for an algorithm that needs it.
    """
    spec = QSpec.from_json(annotation["spec"])
    weight = weight.detach()
    algorithm = make_algorithm(annotation["algorithm"])
    if isinstance(algorithm, WeightAlgorithm):
        with torch.no_grad():
            return algorithm.solve(weight, spec, gram)
    return codes_by_range(weight, *algorithm.estimate(weight, spec), spec)


def needs_zero_point(spec: QSpec, zero_point: Tensor) -> bool:
    """Symmetric codes have none, but for unsigned ones, whose zero is the middle of their range."""
    return spec.scheme == "asymmetric" or bool((zero_point != 0).any())
