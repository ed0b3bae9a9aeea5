"""The compiled passes of dynamic layers: `_dynamic.c`, called with the addresses of tensors."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inc_graph.native import load, memory, runner
from inc_graph.qtypes import get_qtype

__all__ = ["TYPES", "Passes", "passes"]

_SOURCE = Path(__file__).with_name("_dynamic.c")
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu tanh": 3, "silu": 4}
_QUANTIZE, _RANGES, _APPLY, _FINISH = range(4)
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_LARGEST = {kind: float(torch.finfo(kind).max) for kind in TYPES}


class _Job(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("x", "codes", "scale", "zero")),
        *((n, _LONG) for n in ("rows", "cols", "stride", "step", "next", "failed")),
        *((n, _INT) for n in ("type", "symmetric", "qmin", "qmax", "offset", "stage")),
        ("largest", ctypes.c_float),
        ("activation", _INT),
        *((n, _POINTER) for n in ("x_scale", "x_zero", "sums", "bias", "other", "out")),
        ("x_step", _LONG),
        ("out_type", _INT),
        ("unused", _INT),
    )


@functools.cache
def _format(qtype: str) -> tuple[int, int, int]:
    """(least code, greatest code, what is added to them in memory)."""
    qt = get_qtype(qtype)
    return int(qt.qmin), int(qt.qmax), 128 if qt.signed else 0


class Passes:
    """The library, loaded. Tensors are on the CPU, of the dtypes in `TYPES`; nothing is checked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = runner(library, _Job)

    def quantize(self, x: Tensor, qtype: str, symmetric: bool, per_row: bool) -> tuple[Tensor, Tensor]:
        """x [rows, cols] with dense rows -> (codes uint8 [rows, cols], scale and zero point float32 [2, rows or 1])."""
        rows, cols = x.shape
        codes, params = memory(rows, cols, dtype=torch.uint8), memory(2, rows)
        job = self._codes(codes, params, x.dtype, qtype, symmetric)
        job.x, job.type, job.stride = x.data_ptr(), TYPES[x.dtype], x.stride(0)
        if per_row:
            self._go(job, _QUANTIZE)
            return codes, params
        self._go(job, _RANGES)
        self._go(job, _APPLY)
        return codes, params[:, :1]

    def finish(
        self,
        sums: Tensor,
        params: Tensor,
        weight_sums: Tensor | None,
        bias: Tensor | None,
        activation: str,
        dtype: torch.dtype,
        other: Tensor | None = None,
        codes: tuple[str, bool] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The end of a layer; see the C file.

        Args:
            sums: float32 [rows, cols], dense; overwritten where the result is float32.
            params: Of the layer's input.
            weight_sums: float32 [cols]; None if the zero point is accounted for.
            bias: float32 [cols] or None.
            activation: One of `ACTIVATIONS`.
            dtype: Of the result and of `other`.
            other: [rows, cols], dense, or None.
            codes: (qtype, symmetric) of a result that is quantized by row: then as from `quantize`, float32 only.
        """
        rows, cols = sums.shape
        result: Any = None
        if codes is not None:
            result = memory(rows, cols, dtype=torch.uint8), memory(2, rows)
            job = self._codes(*result, dtype, *codes)
        else:
            result = sums if dtype == torch.float32 else memory(rows, cols, dtype=dtype)
            job = _Job(rows=rows, cols=cols, out=result.data_ptr())
        job.x, job.type, job.stride, job.out_type = sums.data_ptr(), 1, cols, TYPES[dtype]
        job.x_scale, job.x_step = params.data_ptr(), int(params.shape[1] > 1)
        if weight_sums is not None:
            job.x_zero = params.data_ptr() + 4 * params.stride(0)
            job.sums = weight_sums.data_ptr()
        job.bias = None if bias is None else bias.data_ptr()
        job.other = None if other is None else other.data_ptr()
        job.activation = ACTIVATIONS[activation]
        self._go(job, _FINISH)
        return result

    def _codes(self, codes: Tensor, params: Tensor, dtype: torch.dtype, qtype: str, symmetric: bool) -> _Job:
        low, high, offset = _format(qtype)
        rows, cols = codes.shape
        where = params.data_ptr()
        return _Job(
            codes=codes.data_ptr(), scale=where, zero=where + 4 * rows, rows=rows, cols=cols, symmetric=symmetric,
            qmin=low, qmax=high, offset=offset, largest=_LARGEST[dtype],
        )  # fmt: skip

    def _go(self, job: _Job, stage: int) -> None:
        job.stage = stage
        if self._run(job):
            raise MemoryError("no memory for two rows of a layer")


def passes() -> Passes | None:
    """The passes; None where they cannot be compiled, or `INC_NATIVE=0`."""
    library = load(_SOURCE)
    return None if library is None else _wrapped(library)


@functools.cache
def _wrapped(library: ctypes.CDLL) -> Passes:
    return Passes(library)
