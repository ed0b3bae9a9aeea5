"""The compiled kernels of weight-only layers: `_weight_only.c` and `.h`, called with the addresses of tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from inc_graph.native import load, runner
from inc_graph.qtypes import QType

__all__ = ["Kernels", "kernels"]

_SOURCE = Path(__file__).with_name("_weight_only.c")
_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.int8: 4, torch.uint8: 5, torch.int32: 6}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Job(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("codes", "scale", "zero", "table")),
        *((n, _LONG) for n in ("rows", "cols", "row_bytes", "block_rows", "block_cols", "param_cols")),
        *((n, _INT) for n in ("bits", "kind", "scale_type", "zero_type")),
        ("out", _POINTER),
        ("out_type", _INT),
        ("x_type", _INT),
        ("x", _POINTER),
        ("bias", _POINTER),
        *((n, _LONG) for n in ("m", "step", "out_stride", "next", "failed")),
    )


@functools.cache
def _format(qtype: QType) -> tuple[Tensor, int, int]:
    """(value of each code, repeated to fill 64 entries; bits; kind) of a format."""
    bits = qtype.storage_bits
    if qtype.codebook is not None:
        values = torch.tensor(qtype.codebook, dtype=torch.float32, device="cpu")
        values = torch.nn.functional.pad(values, (0, 2**bits - len(values)))
    elif qtype.element_dtype is not None:
        values = torch.arange(256, dtype=torch.uint8, device="cpu").view(qtype.element_dtype).float()
    else:
        values = torch.arange(2**bits, dtype=torch.float32, device="cpu")
        if qtype.signed:
            values[2 ** (bits - 1) :] -= 2**bits
    return values.repeat(max(1, 64 // len(values))), bits, 0 if not qtype.is_int else 2 if qtype.signed else 1


class Kernels:
    """The library, loaded. Every method checks nothing: `takes` says what may be handed in."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = runner(library, _Job)
        self.max_rows = int(library.max_rows())
        self.bf16_rows = bool(library.bf16_rows())
        """Whether bfloat16 rows are multiplied as such."""

    @staticmethod
    def takes(qtype: QType, *tensors: Tensor | None) -> bool:
        """Whether the format is one of up to 8 bits, and all tensors are plain memory on the CPU."""
        return qtype.storage_bits <= 8 and all(
            t is None or (t.device.type == "cpu" and t.layout == torch.strided and t.numel() > 0) for t in tensors
        )

    def unpack(
        self,
        out: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        block: Sequence[int],
        qtype: QType,
    ) -> None:
        """Real values of codes (bytes as `inc_graph.packing` makes them, or 8-bit ones) into `out`.

        out float32 or bfloat16 [rows, cols], dense rows; codes [rows, bytes]; scale and zero point [ceil(rows /
        block[0]), ceil(cols / block[1])].
        """
        job, keep = self._job(codes, scale, zero_point, block, qtype, out.shape[0], out.shape[1])
        job.out, job.out_type, job.out_stride, job.step = out.data_ptr(), _TYPES[out.dtype], out.stride(0), 16
        self._go(job)
        del keep

    def multiply(
        self,
        out: Tensor,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        block: Sequence[int],
        qtype: QType,
    ) -> None:
        """`x @ W.T + bias` into `out`. Sums are float32.

        out [m, rows], float32 or bfloat16, and x [m, cols] are dense; x is bfloat16 (if `bf16_rows`), or float32 of at
        most `max_rows` rows.
        """
        rows, m = codes.shape[0], x.shape[0]
        job, keep = self._job(codes, scale, zero_point, block, qtype, rows, x.shape[1])
        if bias is not None:
            bias = bias.to(torch.float32).contiguous()
            job.bias = bias.data_ptr()
        job.out, job.out_type, job.out_stride = out.data_ptr(), _TYPES[out.dtype], rows
        # The more rows x has, the more often it is read: once for each `step` rows of the weight.
        job.step = min(128, max(8, rows // 64 * 8)) if m > 128 else 32
        job.x, job.x_type, job.m = x.data_ptr(), _TYPES[x.dtype], m
        self._go(job)
        del keep

    def _go(self, job: _Job) -> None:
        if self._run(job):
            raise MemoryError("no memory for the scales of a few rows of a weight")

    def _job(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        block: Sequence[int],
        qtype: QType,
        rows: int,
        cols: int,
    ) -> tuple[_Job, tuple[Tensor | None, ...]]:
        """The call's description, and the tensors that must outlive it."""
        table, bits, kind = _format(qtype)
        codes, scale, zero_point = codes.contiguous(), _params(scale), _params(zero_point) if kind else None
        job = _Job(
            codes.data_ptr(),
            scale.data_ptr(),
            None if zero_point is None else zero_point.data_ptr(),
            table.data_ptr(),
            rows,
            cols,
            codes.stride(0),
            rows if block[0] < 0 else block[0],
            cols if block[1] < 0 else block[1],
            scale.shape[1],
            bits,
            kind,
            _TYPES[scale.dtype],
            0 if zero_point is None else _TYPES[zero_point.dtype],
        )
        return job, (codes, scale, zero_point)


def _params(value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    return (value if value.dtype in _TYPES else value.float()).contiguous()


def kernels() -> Kernels | None:
    """The kernels; None where they cannot be compiled, or `INC_NATIVE=0`."""
    library = load(_SOURCE)
    return None if library is None else _wrapped(library)


@functools.cache
def _wrapped(library: ctypes.CDLL) -> Kernels:
    return Kernels(library)
