"""SmoothQuant's scales: pure maths of the input and the weights of layers, no graph.

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)          X' = X / s,  W' = W s,  X' W'^T = X W^T

(Xiao et al. 2022, arXiv:2211.10438, equation 4.) Which alpha is best is a question of the two formats; it is answered
by computing the layer with both rounded, as they will be, on kept data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CRITERIA", "Choice", "candidates", "combined", "search", "smooth_scale"]

CRITERIA: dict[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "min": min,
    "mean": lambda errors: sum(errors) / len(errors),
}
_LEAST = 1e-5  # of max|X_j| and max|W_j|: a channel of zeros needs no scale
_REFINEMENTS = 2


def smooth_scale(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """The scale of each channel, float32 [channels], positive and finite.

    Args:
        x_max: ``max|X_j|``, float32 [channels].
        w_max: ``max|W_j|`` over all weights that read the channel. Channels of zeros get the scale 1.
        alpha: How much of the outliers moves into the weights; at 0 the weights are made even, at 1 the inputs.
    """
    scale = x_max.clamp(min=_LEAST) ** alpha / w_max.clamp(min=_LEAST) ** (1 - alpha)
    return torch.where((x_max > 0) & (w_max > 0), scale, torch.ones_like(scale))


def combined(errors: Sequence[float], criterion: str) -> float:
    """One number for the errors of several layers."""
    return CRITERIA[criterion](errors)


def candidates(first: float, low: float, high: float, step: float) -> list[float]:
    """The grid of the search, the first alpha in front: of equal ones the first wins."""
    count = math.floor((high - low) / step + 1e-9)
    grid = [round(low + i * step, 6) for i in range(count + 1)]
    return list(dict.fromkeys([min(max(first, low), high), *grid, high]))


@dataclass
class Choice:
    """What a search found. `alpha` None: nothing is scaled, and that is better than any alpha."""

    alpha: float | None
    error: float
    tried: dict[float | None, float]


def search(error: Callable[[float | None], float], first: float, low: float, high: float, step: float) -> Choice:
    """The alpha with the least error: of the grid, then between the best and its neighbours, at half the step twice.

    Args:
        error: Of an alpha; of None, if nothing is scaled.
        first, low, high, step: Of the grid.
    """
    tried: dict[float | None, float] = {}

    def ask(alpha: float | None) -> None:
        if alpha not in tried:
            tried[alpha] = error(alpha)

    for alpha in candidates(first, low, high, step):
        ask(alpha)
    best = min(tried, key=tried.__getitem__)
    for _ in range(_REFINEMENTS):
        step /= 2
        for alpha in (best - step, best + step):  # type: ignore[operator]
            if low <= alpha <= high:
                ask(round(alpha, 6))
        best = min(tried, key=tried.__getitem__)
    ask(None)
    best = min(tried, key=tried.__getitem__)
    return Choice(best, tried[best], tried)
