"""The index of a view: the same elements under other sizes.

Sizes that are not known when the graph is made (a batch) hide how often a pattern of channels is repeated along them.
An index has a period for such a dimension: element `i` has the channel of `i % period`, 1 meaning that it does not
depend on it. `[4 * batch, n]` of what was `[batch, 4, n]` has the period 4.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from inc_graph.passes._index import all_ints

__all__ = ["reshaped"]


def reshaped(index: Tensor, inner: list[Any], outer: list[Any]) -> Tensor | None:
    """An index over sizes `outer` as one over `inner`, sizes of the same elements; None if it depends on a dimension
    whose size is not known in a way that has no period."""
    sizes: list[int] = []
    full: list[int] = []
    for a, b in _segments(inner, outer):
        parts = [index.shape[d] for d in b]
        if all(n == 1 for n in parts):
            sizes += [1] * len(a)
            full += parts
        elif all_ints([*(inner[d] for d in a), *(outer[d] for d in b)]):
            sizes += [inner[d] for d in a]
            full += [outer[d] for d in b]
        elif (found := _periods(parts, [inner[d] for d in a], [outer[d] for d in b])) is not None:
            sizes += found[0]
            full += found[1]
        else:
            return None
    times = [n // own if own > 1 else 1 for n, own in zip(full, index.shape, strict=True)]
    return _without_copies(index.repeat(times).expand(full).reshape(sizes))


def _periods(parts: list[int], inner: list[Any], outer: list[Any]) -> tuple[list[int], list[int]] | None:
    """(sizes of the index over `inner`, those to bring it to before) of a run with sizes that are not known.

    What is behind the last one of them is known; what is before it the index must not depend on.
    """
    i, o = (max((d for d, n in enumerate(dims) if not isinstance(n, int)), default=-1) for dims in (inner, outer))
    if i < 0 or o < 0 or any(n != 1 for n in parts[:o]):
        return None
    behind, ours = math.prod(outer[o + 1 :]), math.prod(inner[i + 1 :])
    whole = math.lcm(parts[o] * behind, ours)
    if not _divides(whole // ours, inner[i]):
        return None
    return [1] * i + [whole // ours, *inner[i + 1 :]], [1] * o + [whole // behind, *outer[o + 1 :]]


def _divides(n: int, size: Any) -> bool:
    """Whether a size that is not known is a multiple of `n`, whatever it is."""
    from sympy import Mod

    expression = getattr(getattr(size, "node", None), "expr", None)
    return n == 1 or (expression is not None and Mod(expression, n) == 0)


def _without_copies(index: Tensor) -> Tensor:
    """Without the dimensions along which all entries are the same: it does not depend on them."""
    for d, n in enumerate(index.shape):
        first = index.narrow(d, 0, 1) if n > 1 else index
        index = first if n > 1 and bool((index == first).all()) else index
    return index


def _segments(inner: list[Any], outer: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions that hold the same elements in both; matched from the last dimension on."""
    found: list[tuple[list[int], list[int]]] = []
    i, o = len(inner), len(outer)
    while i or o:
        if i and o and str(inner[i - 1]) == str(outer[o - 1]):
            i, o = i - 1, o - 1
            found.append(([i], [o]))
            continue
        end, a, b = (i, o), 1, 1
        while (i, o) == end or a != b:
            left = i if o == 0 or (a <= b and i) else 0
            size = inner[i - 1] if left else outer[o - 1] if o else None
            if not isinstance(size, int):
                i = o = 0  # sizes that are not known: the rest is one run
                break
            if left:
                i, a = i - 1, a * size
            else:
                o, b = o - 1, b * size
        found.append((list(range(i, end[0])), list(range(o, end[1]))))
    return found[::-1]
