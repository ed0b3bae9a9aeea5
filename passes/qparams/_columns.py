"""Codes of a weight matrix found column by column, so that what one column is off is made up for by others.

With `H = sum x x^T` over the inputs, the outputs are off by ``tr(E H E^T)``, `E` being what the weights are off. Two
ways over the columns, for all rows at once:

* `compensate`, the algorithm of GPTQ (Frantar et al., 2022): round a column, and move the columns that are still to
  come so that the error is least. With ``H^-1 = R^T R``, `R` upper triangular, that is ``W -= e R[j]`` for
  ``e = (w - q) / R[j, j]``.
* `descend`, coordinate descent (as in QuantEase, Behdin et al., 2023, and here over the scales as well): given all
  other columns, the best level of a column is the one nearest to ``q + (E H)[j] / H[j, j]``. No step makes it worse.

Matrices here are transposed, ``[in, out]``: a column of the weight is contiguous. Few columns at a time are dealt with
one by one, and their effect on the others is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_graph.passes.qparams._levels import Levels
from inc_graph.passes.qparams._refine import stored

__all__ = ["Columns", "Find", "compensate", "descend"]

_INNER = 32  # columns that are dealt with one by one between two products

Find = Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]


@dataclass
class Columns:
    """Levels and parameters of the columns of a weight.

    Attributes:
        levels: The format.
        k: Levels, float32 ``[in, out]``.
        scale: float32 ``[groups, out]``.
        zero: Zero points, float32 and whole, ``[groups, out]``; or None.
        group_of: Group of each column.
    """

    levels: Levels
    k: Tensor
    scale: Tensor
    zero: Tensor | None
    group_of: list[int]

    def round(self, j: int, w: Tensor, out: Tensor) -> Tensor:
        """The levels of column j nearest to `w` ``[out]``; `out` is memory for them, or for what they come from."""
        g = self.group_of[j]
        return self.levels.nearest(w, self.scale[g], None if self.zero is None else self.zero[g], out)

    def values(self) -> Tensor:
        """What the levels stand for, float32 ``[in, out]``."""
        return self.k * self.of_columns(self.scale)

    def of_columns(self, params: Tensor) -> Tensor:
        """Parameters ``[groups, out]`` spelled out for each column, ``[in, out]``."""
        return params.index_select(0, torch.tensor(self.group_of, device=params.device))

    def put(self, group: int, params: tuple[Tensor, Tensor | None]) -> None:
        """Set the scale and zero point of a group."""
        self.scale[group] = params[0]
        if self.zero is not None and params[1] is not None:
            self.zero[group] = params[1]

    def groups(self) -> Iterator[slice]:
        """Runs of neighbouring columns of one group."""
        start = 0
        for j in range(1, len(self.group_of) + 1):
            if j == len(self.group_of) or self.group_of[j] != self.group_of[start]:
                yield slice(start, j)
                start = j


def compensate(w: Tensor, r: Tensor, columns: Columns, block: int, find: Find | None = None) -> None:
    """Find the levels of all columns in order.

    Args:
        w: Weights ``[in, out]``; changed.
        r: Upper triangular ``[in, in]`` with ``r^T r`` the inverse of the Hessian.
        columns: Its levels are written, and its parameters if there is `find`.
        block: How many columns are finished before those beyond are brought up to date.
        find: Parameters ``[out]`` of a group from its weights as they are when its turn comes. The columns of a group
            must be neighbours then.
    """
    starts = {} if find is None else {part.start: part.stop for part in columns.groups()}
    inverse = r.diagonal().reciprocal().tolist()
    for a, b in _blocks(len(w), block, starts):
        errors = torch.empty_like(w[a:b])
        for c, d in _cut(a, b, _INNER, starts):
            if find is not None and c in starts:
                columns.put(columns.group_of[c], find(w[c : starts[c]], slice(c, starts[c])))
            for j in range(c, d):
                now, k, error = w[j], columns.k[j], errors[j - a]
                level = columns.round(j, now, k)
                if level is not k:
                    k.copy_(level)
                torch.addcmul(now, k, columns.scale[columns.group_of[j]], value=-1, out=error).mul_(inverse[j])
                if j + 1 < d:
                    w[j + 1 : d].addcmul_(r[j, j + 1 : d, None], error, value=-1)
            if d < b:
                w[d:b].addmm_(r[c:d, d:b].T, errors[c - a : d - a], alpha=-1)
        if b < len(w):
            w[b:].addmm_(r[a:b, b:].T, errors, alpha=-1)


def descend(gradient: Tensor, h: Tensor, columns: Columns, fit_scale: bool) -> None:
    """One round of coordinate descent over the levels of all columns, and (if `fit_scale`) the scales.

    Args:
        gradient: ``h @ (w - values)``, ``[in, out]``; kept up to date.
        h: ``[in, in]``, with a positive diagonal.
        columns: Its levels and scales are improved. The columns of a group are neighbours.
        fit_scale: Whether scales change too.
    """
    diagonal = h.diagonal().reciprocal().tolist()
    scratch = torch.empty_like(gradient[0])
    for part in columns.groups():
        own, local, inner = columns.k[part], gradient[part].clone(), h[part, part]
        before = own * columns.scale[columns.group_of[part.start]]
        if fit_scale:
            _fit_scale(columns, part, local, inner)
        scale = columns.scale[columns.group_of[part.start]]
        for c, d in _cut(0, len(own), _INNER, {}):
            moved = torch.empty_like(local[c:d])
            for j in range(c, d):
                old, change = own[j], moved[j - c]
                wanted = torch.mul(old, scale, out=scratch).add_(local[j], alpha=diagonal[part.start + j])
                level = columns.round(part.start + j, wanted, scratch)
                torch.sub(level, old, out=change).mul_(scale)
                old.copy_(level)
                if j + 1 < d:
                    local[j + 1 : d].addcmul_(inner[j, j + 1 : d, None], change, value=-1)
            if d < len(own):
                local[d:].addmm_(inner[d:, c:d], moved, alpha=-1)
        gradient.addmm_(h[:, part], (own * scale).sub_(before), alpha=-1)


def _fit_scale(columns: Columns, part: slice, local: Tensor, h: Tensor) -> None:
    """Move the scale of a group to where the error is least for the levels as they are, and its gradient with it."""
    g, k = columns.group_of[part.start], columns.k[part]
    curvature = (k * (h @ k)).sum(0)
    old = columns.scale[g].clone()
    fitted = stored(old + (k * local).sum(0) / curvature)
    # 0 would lose the group for good; and a zero point stands for 0 only while the scale keeps its sign
    columns.scale[g] = torch.where((curvature > 0) & fitted.isfinite() & (fitted * old > 0), fitted, old)
    local.addmm_(h, k * (columns.scale[g] - old), alpha=-1)


def _blocks(count: int, size: int, starts: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Blocks of about `size` columns. A group that does not end in the block that it begins in begins a block."""
    a = 0
    while a < count:
        b = min(a + size, count)
        b = next((start for start, stop in starts.items() if a < start < b < stop), b)
        yield a, b
        a = b


def _cut(a: int, b: int, size: int, starts: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Runs of up to `size` columns from a to b, cut where groups begin."""
    while a < b:
        d = next((s for s in range(a + 1, min(a + size, b)) if s in starts), min(a + size, b))
        yield a, d
        a = d
