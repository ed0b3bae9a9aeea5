"""4-bit weights in the layout of torch's tensor core kernel (`aten::_weight_int4pack_mm`, "tinygemm"), and back.

The kernel multiplies with `(code - 8) * scale + zero`, code 0 to 15, both numbers bfloat16. It reads the weight of a
layer as int32 [out / 8, in / (16 k), 32, k / 2], k = 2, 4 or 8: what the 32 threads of a warp hold of 8 output channels
and k tiles of 16 inputs. Thread 4 r + t has row r; of two neighbouring tiles the inputs 8 i + 2 t + h for i = 0..3 and
h = 0, 1, in bits 4 (4 h + i) of one int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GROUPS", "inner_tiles", "nibbles", "pairs_of", "stored_bytes", "tiled"]

GROUPS = (32, 64, 128, 256)
"""Entries along the input that may share a scale."""


def inner_tiles(cols: int) -> int | None:
    """Most tiles of 16 inputs that one thread can read at once; None where the inputs do not fill pairs of tiles."""
    return next((k for k in (8, 4, 2) if cols > 0 and cols % (16 * k) == 0), None)


def tiled(packed: Tensor, signed: bool) -> Tensor:
    """uint8 [out, in / 2] as the graph stores 4-bit codes -> int32 [out / 8, in / (16 k), 32, k / 2].

    The operator wants codes from 0 on, and of each byte the first code in the high half.
    """
    inner = inner_tiles(2 * packed.shape[1])
    assert inner is not None
    raised = packed ^ 0x88 if signed else packed  # code + 8 of two's complement flips the top bit
    return torch.ops.aten._convert_weight_to_int4pack(((raised << 4) | (raised >> 4)).contiguous(), inner)


def nibbles(weight: Tensor) -> Tensor:
    """Inverse of what the operator does: int32 [out / 8, in / (16 k), 32, k / 2] -> codes 0 to 15, uint8 [out, in]."""
    high, wide, _, pairs = weight.shape
    parts = weight.view(torch.uint8)
    each = torch.stack([parts & 15, parts >> 4], -1).reshape(high, wide, 8, 4, pairs, 2, 4)  # ., ., r, t, ., h, i
    return each.permute(0, 2, 1, 4, 6, 3, 5).reshape(high * 8, wide * pairs * 32)


def stored_bytes(weight: Tensor, signed: bool) -> Tensor:
    """Inverse of `tiled`: uint8 [out, in / 2] as the graph stores it."""
    first, second = nibbles(weight).unflatten(1, (-1, 2)).unbind(-1)
    packed = first | (second << 4)
    return packed ^ 0x88 if signed else packed


def pairs_of(scale: Tensor, zero_point: Tensor | None, signed: bool) -> Tensor:
    """Scales and zeros as the kernel reads them: [out, groups] of a graph -> bfloat16 [groups, out, 2].

    `(code - zero_point) * scale` is `(code - 8) * scale + (8 - zero_point) * scale`, with codes from 0 on.
    """
    middle = 0.0 if signed else 8.0
    scale = scale.float()
    zeros = scale * middle if zero_point is None else (middle - zero_point.float()) * scale
    return torch.stack([scale.t(), zeros.t()], -1).to(torch.bfloat16)
