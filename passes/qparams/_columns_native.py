"""The compiled inner loops of `_columns`: `_columns.c`, called with the addresses of tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from inc_graph.native import load, memory, runner
from inc_graph.numerics import MAX_BOUND, MIN_SCALE
from inc_graph.passes.qparams._levels import Levels

__all__ = ["BLOCK", "ColumnKernels", "column_kernels"]

BLOCK = 128
"""Columns of a block: what is done beyond it is a matrix product of torch's, which is faster."""

Run = Callable[[ctypes.Structure], int | None]
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Job(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("w", "m", "k", "scale", "zero", "result", "importance", "group", "end")),
        *((n, _LONG) for n in ("inputs", "out", "a", "b")),
        *((n, _FLOAT) for n in ("qmin", "qmax", "low", "high", "max_bound", "min_scale")),
        *((n, _INT) for n in ("lopsided", "many_bits", "descend", "fit")),
        *((n, _LONG) for n in ("next", "failed")),
    )


class ColumnKernels:
    """Blocks of columns of one weight. Tensors are float32, on the CPU and dense.

    Args:
        library: As compiled.
        levels: An integer format.
        k: Levels ``[in, out]``.
        scale, zero: ``[groups, out]``; zero None for a symmetric scheme.
        group: Of each column.
    """

    def __init__(
        self, run: Run, levels: Levels, k: Tensor, scale: Tensor, zero: Tensor | None, group: list[int]
    ) -> None:
        self._run = run
        self._group = torch.tensor(group, dtype=torch.int32, device="cpu")
        self._kept = k, scale, zero
        low, high = (0.0, 0.0) if levels.asymmetric else (levels.low, levels.high)
        self._job = _Job(
            k=k.data_ptr(),
            scale=scale.data_ptr(),
            zero=None if zero is None else zero.data_ptr(),
            group=self._group.data_ptr(),
            inputs=k.shape[0],
            out=k.shape[1],
            qmin=float(levels.qtype.qmin),
            qmax=float(levels.qtype.qmax),
            low=low,
            high=high,
            max_bound=MAX_BOUND,
            min_scale=MIN_SCALE,
            lopsided=levels.lopsided,
            many_bits=levels.qtype.bits > 6,
        )

    def compensate(
        self, w: Tensor, r: Tensor, a: int, b: int, ends: Tensor | None, importance: Tensor | None
    ) -> Tensor:
        """Levels of columns [a, b), found one after the other; the errors ``[b - a, out]``, over ``r[j, j]``.

        `w` is brought up to date within the block. Where ``ends[j]`` (int32 ``[in]``) is not 0, the parameters of the
        group of columns ``[j, ends[j])`` are found first, those of least error weighted by `importance` if given.
        """
        job = self._job
        job.end = None if ends is None else ends.data_ptr()
        job.importance = None if importance is None else importance.data_ptr()
        job.descend = 0
        return self._go(w, r, a, b)

    def descend(self, gradient: Tensor, h: Tensor, a: int, b: int, fit_scale: bool) -> Tensor:
        """One round of coordinate descent over columns [a, b), and the scales of their groups if `fit_scale`.

        `gradient` is read; how far values moved is returned, ``[b - a, out]``.
        """
        job = self._job
        job.end = job.importance = None
        job.descend, job.fit = 1, fit_scale
        return self._go(gradient, h, a, b)

    def _go(self, w: Tensor, m: Tensor, a: int, b: int) -> Tensor:
        result = memory(b - a, w.shape[1])
        job = self._job
        job.w, job.m, job.result, job.a, job.b = w.data_ptr(), m.data_ptr(), result.data_ptr(), a, b
        if self._run(job):
            raise MemoryError("no memory for some columns of a weight")
        return result


def column_kernels(
    levels: Levels, k: Tensor, scale: Tensor, zero: Tensor | None, group: list[int]
) -> ColumnKernels | None:
    """The kernels for a weight; None if its format is not an integer, it is not on the CPU, or there is no compiler."""
    if not levels.qtype.is_int or k.device.type != "cpu":
        return None
    run = _runner()
    return None if run is None else ColumnKernels(run, levels, k, scale, zero, group)


def _runner() -> Run | None:
    library = load(Path(__file__).with_name("_columns.c"))
    return None if library is None else _of(library)


@functools.cache
def _of(library: ctypes.CDLL) -> Run:
    return runner(library, _Job)
