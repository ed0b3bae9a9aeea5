"""Weights so small or so large that float32 does not hold their squares: quantized at another size, and put back.

Algorithms compare squared errors. A power of two that brings the largest weight near 1 changes no code, and goes into
the scales afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from inc_graph.weights import Codes, Gram, narrow_scale

__all__ = ["at_ordinary_size"]

_ORDINARY = 40  # exponents of two: squares, their sums and a thousandth of them are numbers of float32
_SIZED = ("fp8_scale",)  # notes that are of the size of the weight


def at_ordinary_size(solve: Callable[[Tensor], Codes], weight: Tensor, gram: Gram | None) -> Codes:
    """What `solve` makes of a finite weight of any size; errors in its notes are true ones."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    exponent = math.frexp(largest)[1] if largest else 0
    if abs(exponent) <= _ORDINARY:
        return solve(weight)
    found = solve(_times(weight.double(), -exponent).float())
    scale = _scaled(found.scale, exponent)
    if scale is not None:
        back = replace(found, scale=scale, notes=_notes(found.notes, exponent))
        if bool(back.values().isfinite().all()):
            return back
    plain = solve(weight)  # what is left of it at that size
    notes = {k: v for k, v in plain.notes.items() if k != "rtn_error"}
    if "error" in notes:
        notes["error"] = _error(weight, plain, gram, exponent)
    return replace(plain, notes=notes)


def _times(x: Tensor, exponent: int) -> Tensor:
    return x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def _scaled(scale: Tensor | Codes, exponent: int) -> Tensor | Codes | None:
    """The scale times a power of two; None if it is none that float32 holds in full."""
    if isinstance(scale, Codes):
        inner = _scaled(scale.scale, exponent)
        return None if inner is None else replace(scale, scale=inner)
    moved = _times(scale.double(), exponent)
    low, high = moved.abs().aminmax()
    info = torch.finfo(torch.float32)
    return narrow_scale(moved.float()) if float(low) >= info.tiny and float(high) <= info.max else None


def _notes(notes: Mapping[str, Any], exponent: int) -> dict[str, Any]:
    return {k: math.ldexp(v, exponent) if k in _SIZED else v for k, v in notes.items()}


def _error(weight: Tensor, codes: Codes, gram: Gram | None, exponent: int) -> float:
    """Relative, of the outputs if their inputs are known, else of the weight; in float64."""
    rows = _times(weight.double(), -exponent).flatten(1)
    off = _times(codes.values().double(), -exponent).reshape(weight.shape).flatten(1) - rows

    def energy(x: Tensor) -> float:
        if gram is None or gram.matrix.ndim != 2:
            return float(x.square().sum())
        return float(((x @ gram.matrix.double()) * x).sum())

    whole = energy(rows)
    return math.sqrt(max(energy(off), 0.0) / whole) if whole > 0 else 0.0
