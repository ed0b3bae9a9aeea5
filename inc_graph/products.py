"""Sums of outer products of rows, ``sum x x^T``: what second-order rounding knows of a layer's inputs."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from inc_graph.native import load, memory, runner

__all__ = ["add_products", "fast_products"]

_TILE = 384  # columns: what lies above the diagonal of tiles is the transpose of what lies below
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


def add_products(total: Tensor | None, rows: Tensor, inplace: bool = False) -> Tensor:
    """``total + rows^T rows``: float32 [in, in], symmetric to the last bit; `rows` is [n, in], any float dtype.

    Sums are float32. Of bfloat16 rows the products are exact; others are multiplied in float32.

    Args:
        total: As returned by an earlier call; None: 0.
        rows: What to add.
        inplace: `total` may be changed, and is then what is returned. Else a new tensor is.
    """
    n = rows.shape[1]
    out = rows.new_zeros(n, n, dtype=torch.float32) if total is None else total if inplace else total.clone()
    if (kernel := fast_products()) is not None and kernel.takes(rows):
        kernel.add(out, rows)
        return out
    rows = rows.float()
    for a in range(0, n, _TILE):
        left = rows[:, a : a + _TILE]
        for b in range(0, a + 1, _TILE):
            right = rows[:, b : b + _TILE]
            tile = out[a : a + _TILE, b : b + _TILE]
            tile.addmm_(left.t(), right)
            if a == b:
                tile.copy_(tile.tril() + tile.tril(-1).t())
            else:
                out[b : b + _TILE, a : a + _TILE] = tile.t()
    return out


class _Job(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("x", "pairs", "total")),
        *((n, _LONG) for n in ("rows", "cols", "stride", "next")),
    )


class Products:
    """The compiled product of bfloat16 rows."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.run.restype = None
        self._run, self._width = runner(library, _Job), int(library.width())

    @staticmethod
    def takes(rows: Tensor) -> bool:
        """Whether the rows are bfloat16 in plain memory on the CPU."""
        return rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and rows.layout == torch.strided

    def add(self, total: Tensor, rows: Tensor) -> None:
        """``total += rows^T rows``; total float32 [in, in], dense."""
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        n, cols = rows.shape
        if not n or not cols:
            return
        panels = -(-cols // self._width)
        pairs = memory(panels * -(-n // 2) * self._width, dtype=torch.int32)
        job = _Job(rows.data_ptr(), pairs.data_ptr(), total.data_ptr(), n, cols, rows.stride(0))
        self._run(job)


def fast_products() -> Products | None:
    """The compiled product; None where there is no compiler, or the processor does not multiply bfloat16."""
    library = load(Path(__file__).with_name("_products.c"))
    return _wrapped(library) if library is not None and library.available() else None


@functools.cache
def _wrapped(library: ctypes.CDLL) -> Products:
    return Products(library)
