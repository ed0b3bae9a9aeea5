"""Weights as codes, and what every algorithm that finds them is.

A weight algorithm is pure tensor maths: a weight (and for some, what is known of the inputs that it meets) becomes
`Codes`. The algorithms are in ``inc_graph.passes.qparams``, one a file; `weight_algorithm` makes one by name.

    W ~ dequantize(codes, scale, zero_point, block, qtype)         scale itself may be such codes (double quantization)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from inc_graph.errors import ConfigError
from inc_graph.numerics import dequantize
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec, scale_shape

__all__ = ["Codes", "Gram", "WeightAlgorithm", "narrow_scale", "narrow_zero_point", "weight_algorithm", "with_options"]

T = TypeVar("T")


@dataclass(frozen=True)
class Codes:
    """A quantized tensor with what its codes mean.

    Attributes:
        carrier: One element per entry, of the format's carrier dtype, in the shape of the tensor.
        scale: Floating point, shape ``scale_shape(carrier.shape, block)``; or codes of it, of any shape with as many
            elements (double quantization).
        zero_point: Integers or reals, shaped as the scale, or codes of them; None where it is 0 everywhere.
        spec: The number format, and where scales lie.
        order: int64 [in], a permutation of the input channels of a linear layer, or None. The codes are those of
            ``W[:, order]``: the layer reads ``x[..., order]``.
        notes: What the algorithm has to say for the report: "damping", "error" (relative, of the outputs where inputs
            are known, else of the weight), ...
    """

    carrier: Tensor
    scale: Tensor | Codes
    zero_point: Tensor | Codes | None
    spec: QSpec
    order: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def params(self) -> tuple[Tensor, Tensor | None]:
        """(scale, zero point) as tensors in the shape that the block asks for."""
        shape = scale_shape(self.carrier.shape, self.spec.block(self.carrier.ndim))
        zero = self.zero_point
        values = self.scale.values() if isinstance(self.scale, Codes) else self.scale
        zeros = zero.values() if isinstance(zero, Codes) else zero
        return values.reshape(shape), None if zeros is None else zeros.reshape(shape)

    def values(self) -> Tensor:
        """The real values that the codes stand for, float32, input channels in the order of the layer."""
        scale, zero = self.params()
        block = self.spec.block(self.carrier.ndim)
        found = dequantize(self.carrier, scale, zero, block, self.spec.qtype, torch.float32)
        return found if self.order is None else torch.empty_like(found).index_copy_(1, self.order, found)


@dataclass
class Gram:
    """What is known of the inputs of a layer: ``sum x x^T`` over all of them.

    Attributes:
        matrix: float32 [in, in], symmetric. Of a convolution [groups, in, in]: each group of channels has inputs of its
            own, which are what a position of the output reads, as in ``weight.flatten(1)``.
        count: Rows that were summed; the rank of the matrix is at most that.
        known: What algorithms have derived of the matrix, for the next layer that reads the same inputs.
    """

    matrix: Tensor
    count: int
    known: dict[Any, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class WeightAlgorithm(ABC):
    """Base of the algorithms that find the codes of a weight. Subclasses are frozen dataclasses; fields are options."""

    name: ClassVar[str]
    inputs: ClassVar[bool] = False
    """Whether it needs the `Gram` of the layer's inputs."""

    @abstractmethod
    def solve(self, weight: Tensor, spec: QSpec, gram: Gram | None = None) -> Codes:
        """Codes of a finite weight [out, in] (any rank where the algorithm says so), which is not changed.

        Raises:
            ConfigError: the options or the spec cannot be had together, or do not fit the weight.
            CalibrationError: inputs are needed, and there are none.
        """


def weight_algorithm(name: str, **options: Any) -> WeightAlgorithm:
    """The algorithm registered as `name`, with options.

    Raises:
        UnknownNameError: no algorithm has that name.
        ConfigError: the algorithm is none for weights, or an option is unknown or has an illegal value.
    """
    cls = ALGORITHMS.get(name)
    if not (isinstance(cls, type) and issubclass(cls, WeightAlgorithm)):
        raise ConfigError(f"{name!r} does not find the codes of a weight")
    return with_options("weight algorithm", name, cls, options)


def with_options(what: str, name: str, cls: type[T], options: Mapping[str, Any]) -> T:
    """An object of a dataclass whose fields are its options. ConfigError, which calls it `what`, on unknown ones."""
    valid = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(valid)):
        hint = f"valid options: {', '.join(valid)}" if valid else "it has no options"
        raise ConfigError(f"{what} {name!r} has no option {', '.join(map(repr, unknown))}", hint=hint)
    return cls(**options)


_FP16 = torch.finfo(torch.float16)


def narrow_scale(scale: Tensor) -> Tensor:
    """A scale in float16 where that costs no more than its last bits: a group of 32 pays half a bit for it then."""
    low, high = scale.abs().aminmax() if scale.numel() else (scale.new_zeros(()), scale.new_zeros(()))
    fits = float(low) >= _FP16.tiny and float(high) <= _FP16.max
    return scale.to(torch.float16) if fits else scale.to(torch.float32)


def narrow_zero_point(zero_point: Tensor) -> Tensor:
    """Whole zero points in the narrowest integer dtype that holds them."""
    low, high = (int(v) for v in zero_point.aminmax()) if zero_point.numel() else (0, 0)
    for dtype in (torch.int8, torch.uint8, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return zero_point.to(dtype)
    raise ConfigError(f"zero points from {low} to {high} fit no integer of 32 bits")
