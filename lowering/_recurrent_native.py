"""The compiled steps of LSTM and GRU: `_recurrent.c`, called with the addresses of tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from inc_graph.native import load, memory, runner

__all__ = ["Steps", "steps"]

_SOURCE = Path(__file__).with_name("_recurrent.c")
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_PAD = 32
_LARGEST = 1 << 17  # units: with more of them the state would be left with less than 7 bits


class _Job(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("x", "codes", "scale", "bias", "sizes", "offsets", "first", "h", "c", "out")),
        *((n, _POINTER) for n in ("state", "first_scale", "scales", "bad")),
        *((n, _LONG) for n in ("steps", "batch", "units", "width", "scale_step", "reverse", "parts", "next", "done")),
    )


class Steps:
    """The library, loaded. `takes` says what may be handed in; nothing else is checked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = runner(library, _Job)

    @staticmethod
    def takes(gates: Tensor, h: Tensor, codes: Tensor, zero_point: Tensor | None, block: Sequence[int]) -> bool:
        """Whether weights are int8 with one scale, or one for each row, and all is in memory and not above float32."""
        rows, cols = codes.shape
        kinds = (torch.float32, torch.bfloat16, torch.float16)
        return (
            gates.device.type == codes.device.type == "cpu" and gates.dtype in kinds and codes.dtype == torch.int8
            and zero_point is None and gates.numel() > 0 and h.shape[1] == cols <= _LARGEST
            and rows in (3 * cols, 4 * cols) and block[1] in (-1, cols) and block[0] in (1, -1, rows)
        )  # fmt: skip

    def __call__(
        self,
        gates: Tensor,
        h: Tensor,
        c: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        reverse: bool,
        batch_sizes: Tensor | None,
    ) -> Tensor:
        """As `inc_graph.recurrent.lstm_steps`, or `gru_steps` where `c` is None."""
        n, units = h.shape
        width = -(-units // _PAD) * _PAD
        if batch_sizes is None:
            batch_sizes = torch.full((gates.shape[0],), n, dtype=torch.int64, device="cpu")
        sizes = batch_sizes.contiguous()
        offsets = sizes.cumsum(0) - sizes
        x, first = gates.float().contiguous(), h.float().contiguous()
        now = memory(0) if c is None else c.to(torch.float32, copy=True).contiguous()
        before = first.clone() if c is None else now
        out = memory(*gates.shape[:-1], units * (1 if c is None else 2))
        state, scales = memory(2, n, width, dtype=torch.int16), memory(2, n)
        bad = memory(n, dtype=torch.int64)
        codes, scale = codes.contiguous(), scale.float().reshape(-1).contiguous()
        bias = None if bias is None else bias.float().contiguous()
        self._run(_Job(
            x.data_ptr(), codes.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr(),
            sizes.data_ptr(), offsets.data_ptr(), first.data_ptr(), before.data_ptr(),
            None if c is None else now.data_ptr(), out.data_ptr(), state.data_ptr(), scales[0].data_ptr(),
            scales[1].data_ptr(), bad.data_ptr(), len(sizes), n, units, width, int(scale.numel() > 1), int(reverse),
        ))  # fmt: skip
        return out.to(gates.dtype)


def steps() -> Steps | None:
    """The steps; None where they cannot be compiled, or `INC_NATIVE=0`."""
    library = load(_SOURCE)
    return None if library is None else _wrapped(library)


@functools.cache
def _wrapped(library: ctypes.CDLL) -> Steps:
    return Steps(library)
