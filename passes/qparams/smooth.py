"""SmoothQuant's scales: pure maths of the input and the weights of layers, no graph.

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)          X' = X / s,  W' = W s,  X' W'^T = X W^T

(Xiao et al. 2022, arXiv:2211.10438, equation 4.) Which alpha is best is a question of the two formats; it is answered
by computing the layer with both rounded, as they will be, on kept data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inc_graph.smoothing import Smoothing

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


def candidates(how: Smoothing) -> list[float]:
    """The grid of the search, the first alpha in front: of equal ones the first wins."""
    count = round((how.alpha_max - how.alpha_min) / how.alpha_step + 1e-9)
    grid = [round(min(how.alpha_min + i * how.alpha_step, how.alpha_max), 6) for i in range(count + 1)]
    first = min(max(how.init_alpha, how.alpha_min), how.alpha_max)
    return list(dict.fromkeys([first, *grid, how.alpha_max]))


@dataclass
class Choice:
    """What a search found. `alpha` None: nothing is scaled, and that is better than any alpha."""

    alpha: float | None
    error: float
    tried: dict[Any, float]


def search(how: Smoothing, error: Callable[[float | None], float]) -> Choice:
    """The alpha with the least error: of the grid, then between the best and its neighbours, at half the step twice.

    Args:
        how: The options.
        error: Of an alpha; of None, if nothing is scaled.
    """
    tried: dict[float | None, float] = {}

    def ask(alpha: float | None) -> None:
        if alpha not in tried:
            tried[alpha] = error(alpha)

    for alpha in candidates(how):
        ask(alpha)
    best = min(tried, key=tried.__getitem__)
    step = how.alpha_step
    for _ in range(_REFINEMENTS):
        step /= 2
        for alpha in (best - step, best + step):  # type: ignore[operator]
            if how.alpha_min <= alpha <= how.alpha_max:
                ask(round(alpha, 6))
        best = min(tried, key=tried.__getitem__)
    ask(None)
    best = min(tried, key=tried.__getitem__)
    return Choice(best, tried[best], tried)
