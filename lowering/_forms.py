"""Convolutions in a form that oneDNN's int8 kernels get right: equal kernels, paddings and groups.

The kernels know one padding for both sides of a dimension, and are made for what networks usually hold. Elsewhere they
write wrong values, or beyond their memory. Comparing some ten thousand random convolutions with the reference (torch
2.13, AVX512-VNNI) left these, and nothing else:

* padding as wide as the dilated kernel, or no multiple of the dilation: a window may see no input at all;
* depthwise with several outputs a channel; in three dimensions any depthwise;
* one input channel in three dimensions, or in two with stride [1, more].

All have an equal form that is right: the padding written out, channel groups merged (the weights between them are 0), a
second input channel with weights 0.

Groups are merged for size and speed as well. Groups of 2 channels are padded to 4 by 16; merged by twos they are 4 by 4
and not padded at all: an eighth of the memory, a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inc_graph.lowering._packed import Geometry

__all__ = ["Form", "Sides", "can_absorb", "form_of", "too_many_groups"]

Sides = tuple[tuple[int, int], ...]
"""Padding before and after each space dimension."""
Crop = tuple[slice, ...]

MOST_TAPS = 2
"""Zero taps a dimension, on average, up to which a larger kernel is cheaper than a copy of the input."""
MOST_MERGED = 16
"""Groups merged into one, up to which a kernel that multiplies by zeros is still worth while."""
MOST_PADDED = 4
"""Times the size of the codes that a merged weight may have: then it is as large as in float32."""
SMALL = 1 << 16
"""Bytes up to which a merged weight may have any multiple of its codes' size."""


@dataclass(frozen=True)
class Form:
    """What the kernel gets.

    Attributes:
        codes, geometry: Of the kernel.
        pad: Widths for `constant_pad_nd` that the input needs first, [] for none.
        key: Equal for two forms of one weight whose `codes` are equal.
        restore: Makes the original weight of `codes` again.
    """

    codes: Tensor
    geometry: Geometry
    pad: list[int]
    key: tuple[Any, ...]
    restore: Callable[[Tensor], Tensor]


def form_of(codes: Tensor, stride: tuple[int, ...], sides: Sides, dilation: tuple[int, ...], groups: int) -> Form:
    """The form of a convolution with weight `codes` [out, in / groups, *kernel] and padding `sides`."""
    wide, padding, crop = _taps(codes, sides, dilation)
    pad: list[int] = []
    if padding is None or any(_blind(p, k, d) for p, k, d in zip(padding, wide.shape[2:], dilation, strict=True)):
        pad = [n for side in reversed(sides) for n in side]
        wide, padding, crop = codes, (0,) * len(sides), ()
    merged, times = wide, _merged(wide, groups)
    if times > 1:
        merged = _merge(wide, groups, times)
        groups //= times
    alone = merged.shape[1] == groups == 1 and (len(sides) == 3 or (len(sides) == 2 and stride[0] == 1 < stride[1]))
    if alone:
        pad = [*(pad or [0] * 2 * len(sides)), 0, 1]
        merged = torch.cat([merged, torch.zeros_like(merged)], 1)

    def restore(w: Tensor) -> Tensor:
        w = w[:, :1] if alone else w
        w = _split(w, groups * times, times) if times > 1 else w
        return w[crop] if crop else w

    key = (groups, tuple(merged.shape), tuple(s.start for s in crop))
    return Form(merged, Geometry(stride, padding, dilation, groups), pad, key, restore)


def can_absorb(sides: Sides, dilation: tuple[int, ...]) -> bool:
    """True if zero taps, not too many, make up for padding that differs from side to side."""
    uneven = [(abs(a - b), d) for (a, b), d in zip(sides, dilation, strict=True)]
    return not any(n % d for n, d in uneven) and sum(n // d for n, d in uneven) <= MOST_TAPS * len(sides)


def too_many_groups(codes: Tensor, groups: int) -> bool:
    """True for a depthwise convolution whose groups would have to be merged: too many, or into too large a weight."""
    return _merged(codes, groups) == 0


def _taps(codes: Tensor, sides: Sides, dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...] | None, Crop]:
    """Weight and padding with one number a dimension, and where in the weight the original is; None: there is no such.

    With left L, right R, dilation d and S = max(L, R): (S - L) / d zero taps before and (S - R) / d after the kernel,
    under padding S on both sides, give the same outputs.
    """
    if not can_absorb(sides, dilation):
        return codes, None, ()
    padding = tuple(max(side) for side in sides)
    taps = [((s - a) // d, (s - b) // d) for s, (a, b), d in zip(padding, sides, dilation, strict=True)]
    if not any(map(any, taps)):
        return codes, padding, ()
    crop: Crop = (slice(None), slice(None))
    crop += tuple(slice(a, a + k) for (a, _), k in zip(taps, codes.shape[2:], strict=True))
    return torch.nn.functional.pad(codes, [n for t in reversed(taps) for n in t]), padding, crop


def _blind(padding: int, kernel: int, dilation: int) -> bool:
    """True if a window can lie on padding only: unless some tap of the first window meets the first entry."""
    return padding > dilation * (kernel - 1) or padding % dilation != 0


def _merged(codes: Tensor, groups: int) -> int:
    """How many groups become one: 1 for none, 0 if some have to but there is no good number."""
    depthwise = codes.shape[1] == 1
    if groups == 1 or (depthwise and codes.shape[0] == groups and codes.ndim != 5):
        return 1
    times = [m for m in range(2 if depthwise else 1, min(groups, MOST_MERGED) + 1) if groups % m == 0]
    if not times:
        return 0
    best = min(times, key=lambda m: _padded(codes, groups // m, m))
    too_large = _padded(codes, groups // best, best) > max(MOST_PADDED * codes.numel(), SMALL)
    return 0 if depthwise and too_large else best


def _padded(codes: Tensor, groups: int, times: int) -> int:
    """About the bytes of a weight in the blocks of AVX512 kernels, `times` groups merged to each of `groups`."""
    inner, outer = codes.shape[1] * times, codes.shape[0] // groups
    if inner % 4 or outer % 4 or inner > 16:
        inner, outer = -(-inner // 4) * 4, -(-outer // 16) * 16
    return groups * inner * outer * codes[0, 0].numel()


def _place(codes: Tensor, groups: int, times: int) -> Tensor:
    """For each output, which of the groups that became one it belongs to; shape [out]."""
    return torch.arange(codes.shape[0]) // (codes.shape[0] // groups) % times


def _merge(codes: Tensor, groups: int, times: int) -> Tensor:
    """[out, in / groups, *kernel] -> [out, in / groups * times, *kernel]."""
    out = codes.new_zeros(codes.shape[0], times, *codes.shape[1:])
    out[torch.arange(codes.shape[0]), _place(codes, groups, times)] = codes
    return out.flatten(1, 2)


def _split(codes: Tensor, groups: int, times: int) -> Tensor:
    parts = codes.unflatten(1, (times, -1))
    return parts[torch.arange(codes.shape[0]), _place(codes, groups, times)]
