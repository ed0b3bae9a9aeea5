"""Convolutions in a form that oneDNN's int8 kernels get right: equal kernels, paddings and groups.

The kernels know one padding for both sides of a dimension, and are made for what networks usually hold. Elsewhere they
write wrong values, or beyond their memory. Comparing some ten thousand random convolutions with the reference (torch
2.13, AVX512-VNNI) left these, and nothing else:

* padding as wide as the dilated kernel, or no multiple of the dilation: a window may see no input at all;
* depthwise with several outputs a channel; in three dimensions any depthwise;
* one input channel in three dimensions, or in two with stride [1, more].

All have an equal form that is right: the padding written out, channel groups merged (the weights between them are 0), a
second input channel with weights 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inc_graph.lowering._onednn import Geometry

__all__ = ["Form", "Sides", "can_absorb", "form_of", "too_many_groups"]

Sides = tuple[tuple[int, int], ...]
"""Padding before and after each space dimension."""
Crop = tuple[slice, ...]

MOST_TAPS = 2
"""Zero taps a dimension, on average, up to which a larger kernel is cheaper than a copy of the input."""
MOST_MERGED = 16
"""Groups merged into one, up to which a kernel that multiplies by zeros is still worth while."""


@dataclass(frozen=True)
class Form:
    """What the kernel gets.

    Attributes:
        codes, geometry: Of the kernel.
        pad: Widths for `constant_pad_nd` that the input needs first, [] for none.
        restore: Makes the original weight of `codes` again.
    """

    codes: Tensor
    geometry: Geometry
    pad: list[int]
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

    return Form(merged, Geometry(stride, padding, dilation, groups), pad, restore)


def can_absorb(sides: Sides, dilation: tuple[int, ...]) -> bool:
    """True if zero taps, not too many, make up for padding that differs from side to side."""
    uneven = [(abs(a - b), d) for (a, b), d in zip(sides, dilation, strict=True)]
    return not any(n % d for n, d in uneven) and sum(n // d for n, d in uneven) <= MOST_TAPS * len(sides)


def too_many_groups(codes: Tensor, groups: int) -> bool:
    """True for a depthwise convolution whose groups would have to be merged, but too many of them."""
    return _merged(codes, groups) > MOST_MERGED


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
    """How many groups of one channel have to become one; 1 for none."""
    if groups == 1 or codes.shape[1] != 1 or (codes.shape[0] == groups and codes.ndim != 5):
        return 1
    return next(m for m in range(2, groups + 1) if groups % m == 0)


def _place(codes: Tensor, groups: int, times: int) -> Tensor:
    """For each output, which channel of its merged group it reads; shape [out]."""
    return torch.arange(codes.shape[0]) // (codes.shape[0] // groups) % times


def _merge(codes: Tensor, groups: int, times: int) -> Tensor:
    out = codes.new_zeros(codes.shape[0], times, *codes.shape[2:])
    out[torch.arange(codes.shape[0]), _place(codes, groups, times)] = codes[:, 0]
    return out


def _split(codes: Tensor, groups: int, times: int) -> Tensor:
    return codes[torch.arange(codes.shape[0]), _place(codes, groups, times)][:, None]
