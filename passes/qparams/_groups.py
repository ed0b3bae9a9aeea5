"""A tensor as rows of elements that share a scale, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from inc_graph.calibrate import blocks
from inc_graph.errors import ConfigError
from inc_graph.spec import scale_shape

__all__ = ["check_groups", "chunks", "from_groups", "to_groups"]

_CHUNK = 1 << 18  # elements worked on at a time: a few temporaries of them stay in the cache of one core


def to_groups(x: Tensor, block: Sequence[int]) -> Tensor:
    """float32 ``[groups, elements]``, ragged groups filled up with zeros; a view of `x` where the layout allows it."""
    return blocks(x, block)


def from_groups(rows: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Inverse of `to_groups` for a tensor of that shape, contiguous; what ragged groups were filled with is dropped."""
    if all(g == -1 for g in block):
        return rows.reshape(tuple(shape))
    sizes = [max(n, 1) if g == -1 else g for n, g in zip(shape, block, strict=True)]
    counts = scale_shape(shape, block)
    n = len(sizes)
    order = [d for pair in zip(range(n), range(n, 2 * n), strict=True) for d in pair]
    full = rows.reshape((*counts, *sizes)).permute(order).reshape([c * g for c, g in zip(counts, sizes, strict=True)])
    for d, size in enumerate(shape):
        full = full.narrow(d, 0, size)
    return full.contiguous()


def chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows of ``[rows, elements]`` that fit into the cache."""
    count, width = rows.shape
    step = max(1, _CHUNK // max(width, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def check_groups(shape: Sequence[int], block: Sequence[int]) -> None:
    """ConfigError if a group is larger than the dimension that it divides, or there is nothing to quantize."""
    for d, (n, g) in enumerate(zip(shape, block, strict=True)):
        if g > max(n, 1):
            raise ConfigError(
                f"group size {g} is larger than dimension {d} of the weight, {n}",
                hint="use a smaller group size, or -1 for the whole dimension",
            )
    if math.prod(shape) == 0:
        raise ConfigError(
            f"a weight of shape {list(shape)} has no elements to quantize", hint="keep this layer in float"
        )
