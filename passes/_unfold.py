"""A convolution as a linear layer: its rows are what each position of the output reads (im2col).

conv(x, weight)[:, :, position] = weight.flatten(1) @ row(position)          for each group of channels by itself
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.errors import ConfigError
from inc_graph.graph import inc_meta, module_path, val
from inc_graph.oppattern import argument
from inc_graph.options import parse_algorithm
from inc_graph.spec import QSpec

__all__ = ["Patches", "patches_of"]

_ELEMENTS = 1 << 22  # at a time: each number of a map is in a row for every place of the kernel that reads it


@dataclass(frozen=True)
class Patches:
    """What a convolution of one to three dimensions reads; called with its input it gives the rows.

    Attributes:
        kernel, stride, dilation: A number for each dimension of space.
        padding: Zeros before and behind, for each dimension.
        groups: Of channels.
        elements: Numbers that a chunk of rows may have (if one line of positions has no more).
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    elements: int = _ELEMENTS

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        """Of `x` [batch, channels, *space], any dtype: chunks [groups, positions, channels / groups * prod(kernel)].

        The order within a row is that of ``weight.flatten(1)``. There are none where the kernel does not fit.
        """
        pads = [p for pair in reversed(self.padding) for p in pair]
        space = [n + sum(p) - d * (k - 1) for n, p, d, k in self._zip(x.shape[2:])]
        out = [(n - 1) // s + 1 if n > 0 else 0 for n, s in zip(space, self.stride, strict=True)]
        sample = x.shape[1] * math.prod(self.kernel) * math.prod(out)
        if sample == 0:
            return
        images, lines = self.elements // sample, out[0]
        if images == 0:
            lines = max(1, self.elements // (sample // out[0]))
        for first in range(0, len(x), max(images, 1)):
            part = x[first : first + max(images, 1)]
            part = torch.nn.functional.pad(part, pads) if any(pads) else part
            for line in range(0, out[0], lines):
                yield self._rows(part, line, [min(lines, out[0] - line), *out[1:]])

    def _rows(self, x: Tensor, line: int, out: list[int]) -> Tensor:
        batch, channels, *strides = x.stride()
        inside = x.shape[1] // self.groups
        taps = [s * d for s, d in zip(strides, self.dilation, strict=True)]
        steps = [s * t for s, t in zip(strides, self.stride, strict=True)]
        # positions come last, as they lie in memory: a row of the map is copied at once
        windows = x.as_strided(
            (self.groups, inside, *self.kernel, len(x), *out),
            (inside * channels, channels, *taps, batch, *steps),
            x.storage_offset() + line * steps[0],
        )
        return windows.reshape(self.groups, inside * math.prod(self.kernel), len(x) * math.prod(out)).mT

    def _zip(self, space: Sequence[int]) -> Any:
        return zip(space, self.padding, self.dilation, self.kernel, strict=True)


def patches_of(layer: fx.Node) -> Patches | None:
    """How the inputs of an annotated layer become rows; None for a linear one, whose inputs are rows.

    Raises:
        ConfigError: the layer is a convolution, and an option of its algorithm is not for such.
    """
    if not inc_meta(layer)["op"].startswith("conv"):
        return None
    shape = val(argument(layer, 1)).shape
    dims = len(shape) - 2
    stride, dilation = (_each(argument(layer, i), dims) for i in (3, 5))
    padding, groups = argument(layer, 4), argument(layer, 6)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, shape[2:], strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _each(0 if padding == "valid" else padding, dims))
    _check(layer, shape, groups)
    return Patches(tuple(shape[2:]), stride, pads, dilation, groups)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dims if len(values) == 1 else values)


def _check(layer: fx.Node, shape: Sequence[int], groups: int) -> None:
    annotation = inc_meta(layer)["weight"]
    options = parse_algorithm(annotation["algorithm"])[1]
    size = QSpec.from_json(annotation["spec"]).block(len(shape))[1]
    reason = hint = ""
    if options.get("act_order") and not options.get("static_groups") and -1 < size < shape[1]:
        reason = "act_order puts the inputs of a layer in another order; those of a convolution lie in its kernels"
        hint = "static_groups=True or hybrid_order, which need no order when the model runs, or group_size=-1"
    elif groups > 1 and (options.get("scale_type") or options.get("fp8_aware")):
        what = "use_double_quant" if options.get("scale_type") else "fp8_aware"
        reason = f"{what} looks at all scales of a weight, and the groups of this convolution are rounded one by one"
        hint = f"{what}=False for this layer"
    if reason:
        raise ConfigError(reason, node=layer, module=module_path(layer), hint=hint)
