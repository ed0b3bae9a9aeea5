"""Round to nearest: every weight becomes the level that is nearest to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inc_graph.passes.qparams._double import ScaleOptions
from inc_graph.passes.qparams._groups import check_groups, chunks, from_groups, to_groups
from inc_graph.passes.qparams._levels import Levels, levels_of
from inc_graph.passes.qparams._refine import better_of, fits_half, least_error
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec, scale_shape
from inc_graph.weights import Codes, Gram, WeightAlgorithm

__all__ = ["RTN"]


@ALGORITHMS.register("rtn")
@dataclass(frozen=True)
class RTN(ScaleOptions, WeightAlgorithm):
    """Any weight and any block. Symmetric: ``scale = absmax / qmax``; asymmetric: ``(max - min) / (qmax - qmin)``, the
    range being widened to hold 0. With quantized scales, weights are rounded by the scales that remain.

    Attributes:
        full_range: For signed symmetric integers: ``absmax / -qmin``, with the sign that gives the greatest magnitude
            the lowest code. Other formats have no code to gain.
        search: Find the scale with the least squared error for each group, instead.
    """

    name: ClassVar[str] = "rtn"
    full_range: bool = False
    search: bool = False

    def solve(self, weight: Tensor, spec: QSpec, gram: Gram | None = None) -> Codes:
        levels = levels_of(spec)
        block = spec.block(weight.ndim)
        check_groups(weight.shape, block)
        rows = to_groups(weight.detach(), block)
        scale, zero = _empty(rows, levels)
        for part in chunks(rows):
            _put(scale, zero, part, levels.full_range(rows[part], self.full_range))
        half = True
        if self.search:
            found, found_zero = _empty(rows, levels)
            for part in chunks(rows):
                _put(found, found_zero, part, least_error(rows[part], levels))
            half = fits_half(scale) and fits_half(found)
            for part in chunks(rows):
                choice = [(s[part], None if z is None else z[part]) for s, z in ((found, found_zero), (scale, zero))]
                _put(scale, zero, part, better_of(rows[part], levels, choice[0], choice[1], half=half))
        shape = scale_shape(weight.shape, block)
        kept, used = self.keep_scale(scale.reshape(shape), half)
        used = used.reshape(-1, 1)
        carrier = torch.empty(rows.shape, dtype=levels.qtype.carrier, device=rows.device)
        error, energy = 0.0, 0.0
        for part in chunks(rows):
            x, z = rows[part], None if zero is None else zero[part]
            k = levels.nearest(x, used[part], z)
            error += float((k * used[part]).sub_(x).square_().sum())
            energy += float(torch.dot(x.flatten(), x.flatten()))
            carrier[part] = levels.encode(k, z)
        notes = {"error": math.sqrt(error / energy) if energy else 0.0}
        codes = from_groups(carrier, weight.shape, block)
        return Codes(codes, kept, levels.zero_point(zero, shape, rows.device), spec, notes=notes)


def _empty(rows: Tensor, levels: Levels) -> tuple[Tensor, Tensor | None]:
    scale = rows.new_empty(len(rows), 1)
    return scale, torch.empty_like(scale) if levels.asymmetric else None


def _put(scale: Tensor, zero: Tensor | None, part: slice, params: tuple[Tensor, Tensor | None]) -> None:
    scale[part] = params[0]
    if zero is not None and params[1] is not None:
        zero[part] = params[1]
