"""Tensors by blocks: broadcast one parameter per block over its elements, or reduce each block to one value.

``block`` has one entry per dimension: ``-1`` for the whole dimension, ``1`` for each index, ``g`` for groups of ``g``,
of which the last may be ragged. A tensor of parameters has the shape ``scale_shape(x.shape, block)`` and as many
dimensions as ``x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inc_graph.errors import SpecError
from inc_graph.spec import scale_shape

__all__ = ["align", "block_range", "block_reduce", "check_layout", "per_block"]

Tensor = torch.Tensor


def check_layout(shape: Sequence[int], scale: Tensor, zero_point: Tensor | None, block: Sequence[int]) -> None:
    """Raise :class:`SpecError` unless ``scale`` (and ``zero_point``) have the shape that ``block`` asks for.

    Safe for symbolic shapes: what cannot be decided while tracing becomes a guard.
    """
    want = scale_shape(shape, block)
    for name, param in (("scale", scale), ("zero_point", zero_point)):
        if param is None:
            continue
        if param.dim() != len(want) or any(a != b for a, b in zip(param.shape, want, strict=True)):
            what = f"block {list(block)} of a tensor {list(shape)}"
            raise SpecError(f"{name} has shape {list(param.shape)}, but {what} needs {list(want)}")


def align(x: Tensor, block: Sequence[int], *params: Tensor | None) -> tuple[Any, ...]:
    """``(x', *params')``: views or copies with which ``x' op param'`` broadcasts each block's parameter over its block.

    Per-tensor and per-channel blocks are returned as they are. A dimension in even groups is split in two (a view of
    ``x``). Ragged groups, and groups of a symbolic dimension, spell the parameter out along that dimension instead.
    Undo the split with ``result.reshape(x.shape)``.
    """
    grouped = [d for d, (n, g) in enumerate(zip(x.shape, block, strict=True)) if g > 1 and _several(n, g)]
    if not grouped:
        return (x, *params)
    split: list[int] = []
    for d in grouped:
        n, g = x.shape[d], block[d]
        if isinstance(n, int) and n % g == 0:
            split.append(d)
        else:
            params = tuple(p if p is None else p.repeat_interleave(g, d).narrow(d, 0, n) for p in params)
    for d in reversed(split):  # from the end, so that earlier dimensions keep their numbers
        x = x.unflatten(d, (-1, block[d]))
        params = tuple(p if p is None else p.unsqueeze(d + 1) for p in params)
    return (x, *params)


def block_reduce(x: Tensor, block: Sequence[int], how: str) -> Tensor:
    """Reduce each block of ``x`` to one value.

    Args:
        x: Tensor of any shape.
        block: One entry per dimension.
        how: ``"amin"``, ``"amax"`` or ``"sum"``.

    Returns:
        Tensor of ``x``'s dtype and shape ``scale_shape(x.shape, block)``; 0 for blocks without elements.
    """
    shape = scale_shape(x.shape, block)
    if 0 in x.shape:
        return x.new_zeros(shape)
    dims: list[int] = []
    for d in range(x.dim() - 1, -1, -1):
        n, g = x.shape[d], block[d]
        if g == 1:
            continue
        if g > 1 and _several(n, g):
            ragged = -n % g
            if ragged:  # repeating the last entry changes no minimum or maximum; a sum needs zeros
                last = x.narrow(d, n - 1, 1)
                x = torch.cat([x, (torch.zeros_like(last) if how == "sum" else last).repeat_interleave(ragged, d)], d)
            x = x.unflatten(d, (-1, g))
            dims = [i + 1 for i in dims] + [d + 1]
        else:
            dims.append(d)
    if dims:
        x = getattr(torch, how)(x, dims, keepdim=True)
    return x.reshape(shape)


def per_block(x: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """``x / scale`` with each block divided by its own value; shape of ``x``."""
    view, scale = align(x, block, scale)
    return (view / scale).reshape(x.shape)


def block_range(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``(minimum, maximum)`` of each block; shape ``scale_shape(x.shape, block)``, dtype of ``x``. NaN propagates."""
    return block_reduce(x, block, "amin"), block_reduce(x, block, "amax")


def _several(n: int, g: int) -> bool:
    """Whether ``n`` entries may need more than one group; a symbolic ``n`` is not asked, to leave no guard behind."""
    return n > g if isinstance(n, int) else True
