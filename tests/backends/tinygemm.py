"""The CUDA operators of packed 4-bit weights on the CPU, thread by thread as torch's `int4mm.cu` describes its layout.

`on_cpu()` enters them for CPU tensors, so that what is built on them runs, and can be compared, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


def pack(w: Tensor, inner: int) -> Tensor:
    """uint8 [n, k / 2], the even code in the high half -> int32 [n / 8, k / (16 inner), 32, inner / 2]."""
    assert w.dim() == 2 and w.dtype == torch.uint8 and w.is_contiguous() and inner in (2, 4, 8)
    n, half = w.shape
    assert (2 * half) % (16 * inner) == 0 and n % 8 == 0
    out = torch.zeros(n // 8, 2 * half // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for thread in range(32):
        rows = torch.arange(n // 8) * 8 + thread // 4
        for j in range(inner // 2):
            base = (torch.arange(out.shape[1]) * inner + 2 * j) * 8
            v = [w[rows][:, base + at + thread % 4].long() for at in (0, 4, 8, 12)]
            word = sum((b >> 4) << 4 * i for i, b in enumerate(v)) + sum(
                (b & 15) << 16 + 4 * i for i, b in enumerate(v)
            )
            out[:, :, thread, j] = word
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


@functools.cache
def _places(outer: int, pairs: int) -> tuple[Tensor, ...]:
    """Of each code of 8 rows, by asking `pack` for it: (super tile, thread, word, shift), each [8, k]."""
    k = outer * pairs * 32
    found = torch.zeros(4, 8, k, dtype=torch.int64)
    for column in range(k):
        probe = torch.zeros(8, k, dtype=torch.uint8)
        probe[:, column] = 1
        for place in (mask := pack((probe[:, ::2] << 4) | probe[:, 1::2], 2 * pairs)[0]).nonzero().tolist():
            (bit,) = [i for i in range(0, 32, 4) if int(mask[tuple(place)]) & 0xFFFFFFFF == 1 << i]
            found[:, place[1] // 4, column] = torch.tensor([*place, bit])
    return found.unbind(0)


def unpack(weight: Tensor) -> Tensor:
    """Codes, int32 [n, k]."""
    tiles, outer, _, pairs = weight.shape
    tile, thread, word, shift = _places(outer, pairs)
    return ((weight[:, tile, thread, word] >> shift) & 15).reshape(tiles * 8, -1).int()


def multiply(x: Tensor, weight: Tensor, group: int, pairs: Tensor) -> Tensor:
    """With the checks of the kernel on its arguments, and its rounding."""
    assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.dim() == 2
    n, k = weight.shape[0] * 8, x.shape[1]
    assert weight.dtype == torch.int32 and weight.is_contiguous() and weight.shape[2] == 32
    assert weight.shape[1] == k // (weight.shape[3] * 2 * 16)
    assert group in (32, 64, 128, 256) and k >= group and k % group == 0
    assert pairs.dtype == torch.bfloat16 and pairs.is_contiguous() and pairs.shape == (k // group, n, 2)
    scale, zero = (p.t().float().repeat_interleave(group, 1) for p in pairs.unbind(-1))
    values = torch.addcmul(zero, (unpack(weight) - 8).float(), scale).bfloat16()  # one rounding, as a fused operation
    return (x.float() @ values.float().t()).bfloat16()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """CPU tensors have the two operators."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_convert_weight_to_int4pack", pack, "CPU")
        library.impl("_weight_int4pack_mm", multiply, "CPU")
        yield
