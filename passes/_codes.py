"""A tensor that is known now, quantized: the weight of a layer, or a parameter that is read like an activation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from inc_graph.errors import CalibrationError, ConfigError
from inc_graph.numerics import quantize
from inc_graph.options import make_algorithm
from inc_graph.passes._extremes import at_ordinary_size
from inc_graph.spec import PerBlock, QSpec, scale_shape
from inc_graph.weights import Codes, Gram, WeightAlgorithm, narrow_scale, narrow_zero_point

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

    Raises:
        ConfigError, CalibrationError: as `WeightAlgorithm.solve`.
    """
    spec = QSpec.from_json(annotation["spec"])
    weight = weight.detach()
    algorithm = make_algorithm(annotation["algorithm"])
    if isinstance(algorithm, WeightAlgorithm):
        with torch.no_grad():

            def solve(w: Tensor) -> Codes:
                if algorithm.inputs and w.ndim > 2:
                    return _codes_of_kernels(algorithm, w, spec, gram)
                return algorithm.solve(w, spec, gram)

            return at_ordinary_size(solve, weight, gram if algorithm.inputs else None)
    return codes_by_range(weight, *algorithm.estimate(weight, spec), spec)


def needs_zero_point(spec: QSpec, zero_point: Tensor) -> bool:
    """Symmetric codes have none, but for unsigned ones, whose zero is the middle of their range."""
    return spec.scheme == "asymmetric" or bool((zero_point != 0).any())


# ------------------------------------------------------------------------------------------------------- convolutions
def _codes_of_kernels(algorithm: WeightAlgorithm, weight: Tensor, spec: QSpec, gram: Gram | None) -> Codes:
    """Those of a convolution ``[out, in / groups, *kernel]``: each group of channels is a linear layer of its own."""
    rows = replace(spec, granularity=PerBlock((1, _columns(weight, spec))))
    if gram is None:
        return algorithm.solve(weight.flatten(1), rows)  # says that there is none
    matrices = gram.matrix
    if matrices.ndim != 3 or len(weight) % len(matrices):
        raise CalibrationError(f"products of inputs {list(matrices.shape)} are not those of a convolution")
    parts = weight.flatten(1).chunk(len(matrices))
    known = [gram.known] if len(parts) == 1 else [{} for _ in parts]
    found = [
        algorithm.solve(part, rows, Gram(matrix, gram.count, facts))
        for part, matrix, facts in zip(parts, matrices, known, strict=True)
    ]
    if any(codes.order is not None for codes in found):
        raise ConfigError("the inputs of a convolution cannot be put in another order")
    if len(found) == 1:
        return _shaped(found[0], weight, spec)
    if any(isinstance(c.scale, Codes) or isinstance(c.zero_point, Codes) for c in found):
        raise ConfigError("the scales of a convolution with groups cannot be quantized")
    # float8 has no cat everywhere: bytes do
    carrier = torch.cat([c.carrier.view(torch.uint8) for c in found]).view(found[0].carrier.dtype)
    zeros = [c.zero_point for c in found if isinstance(c.zero_point, Tensor)]
    zero = torch.cat([z if z.is_floating_point() else z.int() for z in zeros]) if zeros else None
    if zero is not None and not zero.is_floating_point():
        zero = narrow_zero_point(zero)
    scale = narrow_scale(torch.cat([c.scale.float() for c in found if isinstance(c.scale, Tensor)]))
    rows_of = torch.stack(parts).float()
    energies = (rows_of @ matrices).mul_(rows_of).sum((1, 2)).tolist()
    notes = _together([c.notes for c in found], energies)
    return _shaped(Codes(carrier, scale, zero, spec, notes=notes), weight, spec)


def _columns(weight: Tensor, spec: QSpec) -> int:
    """How many neighbours in a row of ``weight.flatten(1)`` share a scale."""
    out, inner, *kernel = spec.block(weight.ndim)
    if out != 1 or any(size not in (-1, n) for size, n in zip(kernel, weight.shape[2:], strict=True)):
        raise ConfigError(
            f"weights of a convolution {list(weight.shape)} share scales within an output channel, by whole kernels, "
            f"not {spec.granularity}",
            hint="use rtn for this layer",
        )
    return -1 if inner == -1 else inner * math.prod(weight.shape[2:])


def _shaped(codes: Codes, weight: Tensor, spec: QSpec) -> Codes:
    """Codes of ``weight.flatten(1)`` as those of the weight."""
    shape = scale_shape(weight.shape, spec.block(weight.ndim))
    scale, zero = (t.reshape(shape) if isinstance(t, Tensor) else t for t in (codes.scale, codes.zero_point))
    assert scale is not None
    return replace(codes, carrier=codes.carrier.reshape(weight.shape), scale=scale, zero_point=zero, spec=spec)


def _together(notes: list[Mapping[str, Any]], energies: list[float]) -> dict[str, Any]:
    """What is to be said of all groups: errors are relative to the outputs of all of them."""
    found: dict[str, Any] = {}
    whole = sum(energies)
    for key in dict.fromkeys(key for note in notes for key in note):
        values = [note.get(key, 0) for note in notes]
        if key in ("error", "rtn_error"):
            squares = sum(v * v * energy for v, energy in zip(values, energies, strict=True))
            found[key] = math.sqrt(squares / whole) if whole > 0 else 0.0
        elif key == "dead":
            found[key] = sum(values)
        elif key == "rank":  # of the groups that saw too little
            found[key] = min(note[key] for note in notes if key in note)
        else:
            found[key] = max(values)
    return found
