"""Codes of a weight matrix found column by column, so that what one column is off is made up for by others.

With `H = sum x x^T` over the inputs, the outputs are off by ``tr(E H E^T)``, `E` being what the weights are off. Two
ways over the columns, for all rows at once:

* `compensate`, the algorithm of GPTQ (Frantar et al., 2022): round a column, and move the columns that are still to
  come so that the error is least. With ``H^-1 = R^T R``, `R` upper triangular, that is ``W -= e R[j]`` for
  ``e = (w - q) / R[j, j]``.
* `descend`, coordinate descent (as in QuantEase, Behdin et al., 2023, and here over the scales as well): given all
  other columns, the best level of a column is the one nearest to ``q + (E H)[j] / H[j, j]``. No step makes it worse.

Matrices here are transposed, ``[in, out]``: a column of the weight is contiguous. Few columns at a time are dealt with
one by one, by compiled code if there is any, and their effect on the others is one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_graph.passes.qparams._columns_native import BLOCK, ColumnKernels, column_kernels
from inc_graph.passes.qparams._levels import Levels
from inc_graph.passes.qparams._refine import stored
from inc_graph.passes.qparams._scales import Fp8Window, group_params

__all__ = ["Columns", "Find", "compensate", "descend"]

_INNER = 32  # columns that are dealt with one by one between two products


@dataclass(frozen=True)
class Find:
    """How the parameters of a group are found when its turn comes.

    Attributes:
        levels: The format.
        importance: Of the errors of each column, ``[in]``, for the scales of least error; None: of the full range.
        window: Only powers of two in there; or None.
    """

    levels: Levels
    importance: Tensor | None
    window: Fp8Window | None

    def __call__(self, weights: Tensor, where: slice) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (or None), ``[out]``, for the weights ``[columns, out]`` of columns `where`."""
        importance = None if self.importance is None else self.importance[where]
        return group_params(weights, self.levels, importance, self.window)


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

    def kernels(self) -> ColumnKernels | None:
        """Compiled code for these columns, if there is any."""
        return column_kernels(self.levels, self.k, self.scale, self.zero, self.group_of)

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
    fast = None if find is not None and find.window is not None else columns.kernels()
    r, ends = r.contiguous(), torch.zeros(len(w), dtype=torch.int32, device=w.device)
    for start, stop in starts.items():
        ends[start] = stop
    for a, b in _blocks(len(w), block if fast is None else min(block, BLOCK), starts):
        if fast is None:
            errors = _compensate(w, r, columns, a, b, find, starts)
        else:
            errors = fast.compensate(w, r, a, b, ends, None if find is None else find.importance)
        if b < len(w):
            w[b:].addmm_(r[a:b, b:].T, errors, alpha=-1)


def _compensate(
    w: Tensor, r: Tensor, columns: Columns, a: int, b: int, find: Find | None, starts: dict[int, int]
) -> Tensor:
    """The block of columns [a, b), brought up to date within; the errors ``[b - a, out]``, over ``r[j, j]``."""
    inverse = r.diagonal()[a:b].reciprocal().tolist()
    errors = torch.empty_like(w[a:b])
    for c, d in _cut(a, b, _INNER, starts):
        if find is not None and c in starts:
            columns.put(columns.group_of[c], find(w[c : starts[c]], slice(c, starts[c])))
        for j in range(c, d):
            now, k, error = w[j], columns.k[j], errors[j - a]
            level = columns.round(j, now, k)
            if level is not k:
                k.copy_(level)
            torch.addcmul(now, k, columns.scale[columns.group_of[j]], value=-1, out=error).mul_(inverse[j - a])
            if j + 1 < d:
                w[j + 1 : d].addcmul_(r[j, j + 1 : d, None], error, value=-1)
        if d < b:
            w[d:b].addmm_(r[c:d, d:b].T, errors[c - a : d - a], alpha=-1)
    return errors


def descend(gradient: Tensor, h: Tensor, columns: Columns, fit_scale: bool) -> None:
    """One round of coordinate descent over the levels of all columns, and (if `fit_scale`) the scales.

    Args:
        gradient: ``h @ (w - values)``, ``[in, out]``; kept up to date.
        h: ``[in, in]``, with a positive diagonal.
        columns: Its levels and scales are improved. The columns of a group are neighbours.
        fit_scale: Whether scales change too.
    """
    if (fast := columns.kernels()) is None:
        for part in columns.groups():
            gradient.addmm_(h[:, part], _descend(gradient, h, columns, part, fit_scale), alpha=-1)
        return
    h = h.contiguous()
    for part in _joined(columns.groups(), BLOCK):
        fit = fit_scale and part.stop - part.start <= BLOCK
        if fit_scale and not fit:
            before = columns.scale[columns.group_of[part.start]].clone()
            _fit_scale(columns, part, gradient[part].clone(), h[part, part])
            change = columns.k[part] * (columns.scale[columns.group_of[part.start]] - before)
            gradient.addmm_(h[:, part], change, alpha=-1)
        for a in range(part.start, part.stop, BLOCK):
            b = min(a + BLOCK, part.stop)
            gradient.addmm_(h[:, a:b], fast.descend(gradient, h, a, b, fit), alpha=-1)


def _descend(gradient: Tensor, h: Tensor, columns: Columns, part: slice, fit_scale: bool) -> Tensor:
    """One round over a group of columns; how far their values moved, ``[columns, out]``."""
    own, local, inner = columns.k[part], gradient[part].clone(), h[part, part]
    diagonal = inner.diagonal().reciprocal().tolist()
    before = own * columns.scale[columns.group_of[part.start]]
    if fit_scale:
        _fit_scale(columns, part, local, inner)
    scale, scratch = columns.scale[columns.group_of[part.start]], torch.empty_like(gradient[0])
    for c, d in _cut(0, len(own), _INNER, {}):
        moved = torch.empty_like(local[c:d])
        for j in range(c, d):
            old, change = own[j], moved[j - c]
            wanted = torch.mul(old, scale, out=scratch).add_(local[j], alpha=diagonal[j])
            level = columns.round(part.start + j, wanted, scratch)
            torch.sub(level, old, out=change).mul_(scale)
            old.copy_(level)
            if j + 1 < d:
                local[j + 1 : d].addcmul_(inner[j, j + 1 : d, None], change, value=-1)
        if d < len(own):
            local[d:].addmm_(inner[d:, c:d], moved, alpha=-1)
    return (own * scale).sub_(before)


def _fit_scale(columns: Columns, part: slice, local: Tensor, h: Tensor) -> None:
    """Move the scale of a group to where the error is least for the levels as they are, and its gradient with it."""
    g, k = columns.group_of[part.start], columns.k[part]
    curvature = (k * (h @ k)).sum(0)
    old = columns.scale[g].clone()
    fitted = stored(old + (k * local).sum(0) / curvature)
    # 0 would lose the group for good; and a zero point stands for 0 only while the scale keeps its sign
    columns.scale[g] = torch.where((curvature > 0) & fitted.isfinite() & (fitted * old > 0), fitted, old)
    local.addmm_(h, k * (columns.scale[g] - old), alpha=-1)


def _joined(parts: Iterator[slice], size: int) -> Iterator[slice]:
    """Neighbouring slices put together up to `size` columns; a longer one stays alone."""
    whole: slice | None = None
    for part in parts:
        if whole is not None and part.stop - whole.start <= size:
            whole = slice(whole.start, part.stop)
            continue
        if whole is not None:
            yield whole
        whole = part
    if whole is not None:
        yield whole


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
