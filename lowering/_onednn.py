"""int8 layers on oneDNN: prepacked weights, fused activation, fused residual add, requantized output.

A layer is one immutable object that holds all constants of a convolution or linear layer. Called directly it goes
straight to `torch.ops.onednn`; under torch.compile it goes through one opaque operator of ours, because a packed weight
can be neither a graph constant nor a module buffer there. Accumulation is exact in int32; scaling and post-ops are
float32.

Shapes: linear x [*, in] -> [*, out]; convolution x [N, C, *space] -> [N, out, *space'], channels last in memory. A
convolution of one dimension runs as one of two, [N, C, 1, L], for which the kernels can fuse more.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inc_graph.errors import LoweringError
from inc_graph.lowering._direct import packed_as_operator
from inc_graph.lowering._packed import Geometry, PackedWeight

__all__ = ["HAS_OPAQUE", "Activation", "Int8Layer", "NotPickled", "Other", "Output", "PackedLayer",
           "define", "int8_layer", "int8_layer_add", "int8_layer_sum", "real"]  # fmt: skip

onednn = torch.ops.onednn

try:  # private, and absent before torch 2.9: without it torch.compile breaks the graph at each layer, and works
    from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
    from torch._opaque_base import OpaqueBase

    HAS_OPAQUE = True
except ImportError:
    OpaqueBase, HAS_OPAQUE = object, False  # type: ignore[misc,assignment]


@dataclass(frozen=True)
class Activation:
    """oneDNN's name of a fused activation function, its numbers and its variant."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


@dataclass(frozen=True)
class Output:
    """What a layer writes: float32 (or bfloat16), or codes of `dtype` with a scale and zero point."""

    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    zero_point: int = 0


@dataclass(frozen=True)
class Other:
    """A second operand that the layer adds before its activation.

    "add": float32 values (linear layers only). "sum": codes with a scale and zero point, of the dtype of the output;
    the kernel writes its result into their memory.
    """

    form: str
    scale: float = 1.0
    zero_point: int = 0


class NotPickled(LoweringError, pickle.PicklingError):
    """A packed layer was to be pickled. torch.compile tries, for its cache, and goes on without."""


PLAIN, FLOAT = Activation(), Output()

# What the kernels take, by dimensions of space (0: linear layer).
_CONV = ("none", "relu", "hardtanh", "hardswish", "swish")
ACTIVATIONS = {0: (*_CONV, "gelu", "tanh", "leaky_relu"), 1: _CONV, 2: _CONV, 3: ("none",)}
FORMS: dict[int, tuple[str, ...]] = {0: ("add", "sum"), 1: ("sum",), 2: ("sum",), 3: ()}
"""Operands that can be added; behind one only "none" and "relu" are possible."""


class PackedLayer(OpaqueBase):
    """A layer in oneDNN's layout, which torch.compile does not look into. Immutable: copies are the layer itself."""

    def __copy__(self) -> PackedLayer:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotPickled(
            "a layer that is packed for this machine's oneDNN cannot be pickled",
            hint="inc_graph.quantization.save(q_model, folder) saves what it was made of",
        )


class Int8Layer(PackedLayer):
    """A quantized linear layer (geometry None) or convolution, ready to run.

    Args:
        weight: Packed; other layers may share it.
        bias: float32 [out] or None.
        x_scale, x_zero_point: of the input, uint8 (linear: or int8).
        geometry: Of a convolution; its groups are those that the weight was packed for. Default: all as packed.
        activation, output, other: What is fused behind it.
        counted: Whether `nbytes` counts the weight: False if another layer does.

    Raises:
        LoweringError: for a combination that the kernels would refuse when they run.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        x_scale: float,
        x_zero_point: int,
        geometry: Geometry | None = None,
        activation: Activation = PLAIN,
        output: Output = FLOAT,
        other: Other | None = None,
        counted: bool = True,
    ) -> None:
        self.weight, self.geometry = weight, geometry or weight.geometry
        self.activation, self.output, self.other = activation, output, other
        self.shape, self.bias, self._counted = weight.shape, bias, counted
        self._check()
        space = () if self.geometry is None else self.geometry.arguments()
        self._flat = self.geometry is not None and len(self.geometry.stride) == 1
        kernels = (onednn.qlinear_pointwise.default, onednn.qlinear_pointwise.binary)
        if self.geometry is not None:
            kernels = (onednn.qconv_pointwise.default, onednn.qconv2d_pointwise.binary)
        added = () if other is None else (other.scale, other.zero_point, other.form, 1.0)
        post = (activation.name, list(activation.scalars), activation.algorithm)
        self._kernel = kernels[other is not None]
        self._in_place = other is not None and other.form == "sum"
        linear = self.geometry is None
        self._layout = torch.contiguous_format if linear else torch.channels_last  # of the second operand
        self._head = (x_scale, x_zero_point, weight.tensor, weight.scale, weight.zero)
        self._rest = (bias, *space, output.scale, output.zero_point, output.dtype, *added, *post)

    def _check(self) -> None:
        """Everything that the kernels refuse at run time is refused here."""
        dims = 0 if self.geometry is None else len(self.geometry.stride)
        added = self.other is None or (self.other.form in FORMS[dims] and self.activation.name in ("none", "relu"))
        if not added or self.activation.name not in ACTIVATIONS[dims]:
            raise LoweringError(f"oneDNN has no kernel for {self!r}")

    # --------------------------------------------------------------------------------------------------- execution
    def run(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The layer on codes `x`. With `other`, its value is added before the activation.

        For the "sum" form `other` is written to and returned, or a copy of it if its layout is not the output's.
        """
        if not x.numel():  # the kernels lose dimensions of an empty batch
            return self.empty_out(x)
        if self._flat:
            x, other = x.unsqueeze(-2), None if other is None else other.unsqueeze(-2)
        if other is None:
            out = self._kernel(x, *self._head, *self._rest)
        else:
            other = other.contiguous(memory_format=self._layout)
            out = self._kernel(x, *self._head, other, *self._rest)
            if self._in_place:  # what the kernel gives back is a copy of what it has written
                out = other
        return out.squeeze(-2) if self._flat else out

    def out_shape(self, x: Tensor) -> list[Any]:
        """Output shape for input `x`."""
        if self.geometry is None:
            return [*x.shape[:-1], self.shape[0]]
        return [x.shape[0], self.shape[0], *self.geometry.out(x.shape[2:], self.shape[2:])]

    def empty_out(self, x: Tensor) -> Tensor:
        """An output of the right shape, dtype and memory layout, not filled (for shape propagation)."""
        shape = self.out_shape(x)
        if self.geometry is None:
            return x.new_empty(shape, dtype=self.output.dtype)
        last = x.new_empty([shape[0], *shape[2:], shape[1]], dtype=self.output.dtype)
        return last.permute(0, -1, *range(1, len(shape) - 1))

    # ----------------------------------------------------------------------------------------------------- storage
    def nbytes(self) -> int:
        """Bytes of the bias, and of the packed weight unless another layer counts it."""
        own = 0 if self.bias is None else self.bias.nbytes
        return own + (self.weight.nbytes() if self._counted else 0)

    def __repr__(self) -> str:
        kind = "linear" if self.geometry is None else f"conv{len(self.geometry.stride)}d"
        fused = [self.other.form] if self.other else []
        fused += [self.activation.name] if self.activation.name != "none" else []
        return f"Int8Layer({' + '.join([f'{kind} {list(self.shape)}', *fused])} -> {self.output.dtype})"


# ------------------------------------------------------------------------------------------ targets of graph calls
LIBRARY = torch.library.Library("inc_onednn", "FRAGMENT")


def real(layer: Any) -> Any:
    """The object behind what a tracer hands in."""
    return getattr(layer, "real_obj", layer)


def _layer_sum_(x: Tensor, other: Tensor, layer: Any) -> None:
    out = real(layer).run(x, other)
    if out.data_ptr() != other.data_ptr():
        other.copy_(out)


def define(schema: str, run: Any, fake: Any) -> None:
    """Add an operator to this library: its schema, what it does, and what it does to shapes."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"inc_onednn::{name}", fake, lib=LIBRARY)


if HAS_OPAQUE:
    register_opaque_type(Int8Layer, typ="reference")
    _type = get_opaque_type_name(Int8Layer)
    define(
        f"layer(Tensor x, {_type} layer) -> Tensor",
        lambda x, layer: real(layer).run(x),
        lambda x, layer: real(layer).empty_out(x),
    )
    define(
        f"layer_add(Tensor x, Tensor other, {_type} layer) -> Tensor",
        lambda x, other, layer: real(layer).run(x, other),
        lambda x, other, layer: real(layer).empty_out(x),
    )
    define(f"layer_sum_(Tensor x, Tensor(a!) other, {_type} layer) -> ()", _layer_sum_, lambda x, other, layer: None)
else:
    Int8Layer.run = torch.compiler.disable(Int8Layer.run)  # type: ignore[method-assign]


def int8_layer(x: Tensor, layer: Int8Layer) -> Tensor:
    """Run a layer on uint8 (or int8) codes."""
    if packed_as_operator(HAS_OPAQUE):
        return torch.ops.inc_onednn.layer(x, layer)
    return layer.run(x)


def int8_layer_add(x: Tensor, other: Tensor, layer: Int8Layer) -> Tensor:
    """Run a layer and add `other` (float32) before its activation."""
    if packed_as_operator(HAS_OPAQUE):
        return torch.ops.inc_onednn.layer_add(x, other, layer)
    return layer.run(x, other)


def int8_layer_sum(x: Tensor, other: Tensor, layer: Int8Layer) -> Tensor:
    """Run a layer and add the codes `other` into their own memory, which is given back. The caller owns `other`."""
    if packed_as_operator(HAS_OPAQUE):
        torch.ops.inc_onednn.layer_sum_(x, other, layer)
        return other
    return layer.run(x, other)
