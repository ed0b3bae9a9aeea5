"""Functions on codes that the lowered graph calls: into codes, back, and what oneDNN's layers need around them.

Each is a call target of the graph; torch.compile traces through it, so under inductor they fuse with their neighbours.
Called directly they are one or two passes over the data.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from inc_graph.lowering._direct import is_watched

__all__ = ["codes_to_unsigned", "dequantize_codes", "lookup_rows", "max_pool", "quantize_codes", "spread"]


def quantize_codes(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """Real values to uint8 or int8 codes over the whole range of the type; the strides are those of `empty_like(x)`.

    Rounds as the reference does but for exact ties: torch's kernel rounds `x / scale + zero_point`, the reference
    `x / scale` (and then adds), so with an odd zero point a value half-way between two codes may get the other one. NaN
    saturates like +inf, which is what torch's kernel makes of it: finding it first would cost half as much again.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter)  # not fake: before torch 2.9 the kernel below has no fake form
    if is_watched() or x.device.type != "cpu" or not plain:
        info = torch.iinfo(dtype)
        codes = torch.clamp(torch.round(x.float() * (1.0 / scale)) + zero_point, min=info.min)
        return torch.fmin(codes, codes.new_full((), info.max)).to(dtype)  # of NaN and a number it is the number
    x = x.float()
    if _wraps():
        x = x.clamp(-(2.0**20) * scale, 2.0**20 * scale)
    qdtype = torch.quint8 if dtype == torch.uint8 else torch.qint8
    if torch.ops.aten.is_non_overlapping_and_dense.default(x):  # any layout without holes: the memory as one row
        q = torch.quantize_per_tensor(x.as_strided((x.numel(),), (1,)), scale, zero_point, qdtype)
        return torch.empty(0, dtype=dtype, device=x.device).set_(q.untyped_storage(), 0, x.shape, x.stride())
    q = torch.quantize_per_tensor(x, scale, zero_point, qdtype).int_repr()
    return torch.empty_like(x, dtype=dtype).copy_(q)  # the layout that shape propagation has promised


@functools.cache
def _wraps() -> bool:
    """Before torch 2.9 the kernel adds the zero point in int32, which the code of a huge value overflows."""
    with warnings.catch_warnings():  # torch warns, once, of a later release than the range this package supports
        warnings.simplefilter("ignore")
        codes = torch.quantize_per_tensor(
            torch.full((64,), 1e30, dtype=torch.float32, device="cpu"), 0.02, 255, torch.quint8
        ).int_repr()
    return not bool((codes == 255).all())


def dequantize_codes(q: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """Codes to real values, bit for bit as the reference."""
    y = q.to(torch.float32)
    if zero_point:
        y = y.sub_(zero_point)
    return y.mul_(scale).to(dtype)


def codes_to_unsigned(x: Tensor) -> Tensor:
    """int8 codes as uint8 codes of a zero point 128 higher: the same values."""
    return x.view(torch.uint8) ^ 128


def lookup_rows(table: Tensor, scale: Tensor, zero_point: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a quantized table, dequantized after the lookup.

    table int8 or uint8 [rows, dim], scale float32 and zero_point int32 [rows, 1], index int [*] -> [*, dim].
    """
    codes = torch.embedding(table, index).to(torch.float32)
    if zero_point is not None:
        codes = codes.sub_(torch.embedding(zero_point, index))
    return codes.mul_(torch.embedding(scale, index)).to(dtype)


def max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil: bool
) -> Tensor:
    """`aten.max_pool1d`, `2d` or `3d` on codes [N, C, *space] or [C, *space], one number a dimension.

    torch's own kernel keeps its indices in the type of the codes, so that it refuses any channels-last map of more than
    255 places. The maximum over a box is the maximum along one dimension after the other, and each of those is an
    elementwise maximum of slices: fast in every layout, and inductor fuses it.
    """
    stride = stride or kernel
    low = torch.iinfo(x.dtype).min
    for d, k, s, p, step in zip(range(-len(kernel), 0), kernel, stride, padding, dilation, strict=True):
        reach, n = step * (k - 1) + 1, x.shape[d] + 2 * p
        out = (n - reach + (s - 1 if ceil else 0)) // s + 1
        if ceil and (out - 1) * s >= n - p:  # the last window has to begin inside the input
            out -= 1
        after = max((out - 1) * s + reach - n, 0) + p
        if p or after:
            x = torch.nn.functional.pad(x, [0, 0] * (-d - 1) + [p, after], value=low)
        places = [[slice(None)] * x.ndim for _ in range(k)]
        for i, place in enumerate(places):
            place[d] = slice(i * step, i * step + (out - 1) * s + 1, s)
        windows = [x[tuple(place)] for place in places]
        x = windows[0]
        for window in windows[1:]:
            x = torch.maximum(x, window)
    return x.clone() if all(k == 1 for k in kernel) else x  # never a view: a fused sum may write to it


def spread(x: Tensor, stride: Sequence[int], before: Sequence[int], after: Sequence[int], fill: int) -> Tensor:
    """Codes with `stride - 1` fill values between neighbours and a border of `fill`, channels last in memory.

    The input of a transposed convolution. Negative borders cut off. x [N, C, *space].
    """
    space: list[int] = []
    where, kept = [slice(None), slice(None)], [slice(None), slice(None)]
    for n, s, b, a in zip(x.shape[2:], stride, before, after, strict=True):
        left, right, length = max(b, 0), max(a, 0), (n - 1) * s + 1
        space.append(left + length + right)
        where.append(slice(left, left + length, s))
        kept.append(slice(max(-b, 0), left + length + right - max(-a, 0)))
    out = torch.full((x.shape[0], *space, x.shape[1]), fill, dtype=x.dtype, device=x.device)
    out = out.permute(0, -1, *range(1, x.ndim - 1))
    out[tuple(where)] = x
    return out[tuple(kept)]
