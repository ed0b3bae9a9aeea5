"""How many directions of its inputs a layer has seen: the rank of the sum of their outer products, or a bound."""

from __future__ import annotations

import torch

from inc_graph.weights import Gram

__all__ = ["rank_of"]

_SOME = 384  # columns of which the rank is counted; of all it would cost as much as the solution
_SLACK = 16  # one in so many directions may be missing by construction: a layer norm takes out the mean
_LEAST = 1e-5  # an eigenvalue below this part of 1, which is the mean, is what float32 has made of 0


def rank_of(gram: Gram) -> int:
    """The rank, as far as dead columns, rows, and what some of the columns have in common tell.

    Columns are compared at one size, so that a few loud ones do not hide the rest. A few directions that are missing
    among them do not count: with more data they would still be.
    """
    if "rank" in gram.known:
        return int(gram.known["rank"])
    diagonal = gram.matrix.diagonal()
    alive = torch.nonzero(diagonal > 0).flatten()
    found = min(len(alive), gram.count)
    if found:
        some = alive[
            torch.linspace(0, len(alive) - 1, min(_SOME, len(alive)), dtype=torch.float32, device=alive.device).long()
        ]
        size = diagonal[some].double().rsqrt()
        part = gram.matrix[some][:, some].double() * size[:, None] * size
        seen = int((torch.linalg.eigvalsh(part) > _LEAST).sum())
        if seen < min(len(some), gram.count) - max(1, len(some) // _SLACK):
            found = min(found, seen)
    gram.known["rank"] = found
    return found
