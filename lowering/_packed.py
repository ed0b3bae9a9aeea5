"""Weights in oneDNN's own layout. Layers that read one weight share it: a layer that is called twice is packed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Geometry", "PackedWeight"]

onednn = torch.ops.onednn


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation of a convolution, one entry per space dimension; and its groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def out(self, size: Sequence[Any], kernel: Sequence[int]) -> list[Any]:
        """Output space of an input of space `size`."""
        dims = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in dims]

    def arguments(self) -> tuple[Any, ...]:
        """As the kernels take it: in two or three dimensions."""
        one = int(len(self.stride) == 1)  # a row is a map of height 1
        return [1] * one + [*self.stride], [0] * one + [*self.padding], [1] * one + [*self.dilation], self.groups


class PackedWeight:
    """An int8 weight, packed, with its scales. Immutable.

    The kernels take any geometry (of these groups), input shape and input scale with it. What is given here is what the
    layout is chosen for; a kernel that wants another one reorders the weight at each call, so that a share of the time
    is lost and nothing else.

    Args:
        codes: int8, [out, in] or [out, in / groups, *kernel].
        scale: float32 [out].
        x_shape: A typical input shape.
        geometry: Of a convolution, None for a linear layer.
        asymmetric: Whether inputs have another zero point than 0: oneDNN then stores a correction with a convolution's
            weight. An input without one is computed correctly all the same.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        x_shape: Sequence[int],
        geometry: Geometry | None = None,
        asymmetric: bool = True,
    ) -> None:
        self.shape, self.geometry = tuple(codes.shape), geometry
        self.scale = scale.contiguous()
        self.zero = torch.zeros(len(scale), dtype=torch.int32)
        if geometry is None:
            self.tensor = onednn.qlinear_prepack(codes.contiguous(), list(x_shape))
            return
        # torch keeps the layouts that oneDNN has asked for, by shape, and forgets whether the input had a zero point:
        # the first of two such weights would decide for both, and the other would be reordered at each call, up to five
        # times slower. The layout does not depend on the batch: it is odd for one and even for the other.
        typical = [2 * max(x_shape[0], 1) + (not asymmetric), *x_shape[1:]]
        if len(geometry.stride) == 1:
            codes, typical = codes.unsqueeze(-2), [*typical[:2], 1, *typical[2:]]
        x_scale = 0.5  # any but 1
        self.tensor = onednn.qconv_prepack(codes, self.scale, x_scale, int(asymmetric), *geometry.arguments(), typical)

    def codes(self) -> Tensor:
        """The int8 weight, unpacked: the packed form is the only copy that is kept."""
        dense = self.tensor.to_dense()
        return (dense.t() if self.geometry is None else dense.reshape(self.shape)).contiguous()

    def nbytes(self) -> int:
        """Bytes of the weight as it is packed (padded to oneDNN's blocks), of its scales and its zero points."""
        return int(torch.ops.mkldnn._nbytes(self.tensor)) + self.scale.nbytes + self.zero.nbytes
