"""int8 linear layers whose inputs are quantized as they come, on oneDNN.

    codes, params = dynamic_codes(x)      one pass: range, scale, zero point and codes, of each row or of all
    sums = codes @ W.T                    oneDNN's int8 product, once for all rows, scaled by the weight's scales
    y = scale (sums - zero * sum W) + b   one pass, with what fuses: an addition, an activation, the next quantization

oneDNN takes one scale for a tensor; the rows' own are applied behind it, so that both granularities are one kernel. A
symmetric format's zero point is the same everywhere, and oneDNN's business. Codes are uint8 (see `_dynamic.c`): signed
inputs are a hundred times slower on processors without AVX-VNNI-INT8.

`taken` counts what ran, for tests and benchmarks: "native" and "torch" passes, and "gemm".
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inc_graph import numerics
from inc_graph.lowering import _onednn
from inc_graph.lowering._direct import is_watched, packed_as_operator
from inc_graph.lowering._dynamic_native import ACTIVATIONS, TYPES, Passes, passes
from inc_graph.lowering._onednn import HAS_OPAQUE, PackedLayer, define, onednn, real
from inc_graph.lowering._packed import PackedWeight
from inc_graph.qtypes import get_qtype

__all__ = ["ACTIVATIONS", "DynamicLayer", "dynamic_codes", "dynamic_layer", "dynamic_layer_add", "dynamic_layer_codes",
           "taken"]  # fmt: skip

taken: Counter[str] = Counter()


# ------------------------------------------------------------------------------------------------------------- inputs
def _codes(x: Tensor, qtype: str, scheme: str, per_row: bool) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    native = _native(rows)
    if native is None:
        codes, params = _codes_by_torch(rows, qtype, scheme, per_row)
    else:
        taken["native"] += 1
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        codes, params = native.quantize(rows, qtype, scheme == "symmetric", per_row)
    return codes.view(x.shape), params


def _native(x: Tensor) -> Passes | None:
    plain = x.device.type == "cpu" and x.dtype in TYPES and x.numel() > 0 and not is_watched()
    return passes() if plain else None


def _codes_by_torch(x: Tensor, qtype: str, scheme: str, per_row: bool) -> tuple[Tensor, Tensor]:
    """As the compiled pass, in a dozen of them."""
    block = (1, -1) if per_row else (-1, -1)
    if not x.numel():
        return x.new_empty(x.shape, dtype=torch.uint8), x.new_zeros(2, len(x) if per_row else 1, dtype=torch.float32)
    taken["torch"] += 1
    scale, zero = numerics.choose_qparams(x, block, qtype, scheme)
    codes, offset = numerics.quantize(x, scale, zero, block, qtype), 128 if get_qtype(qtype).signed else 0
    codes = codes.contiguous()  # the strides of x else
    codes = codes.view(torch.uint8) ^ 128 if offset else codes
    return codes, torch.cat([scale.reshape(1, -1), zero.reshape(1, -1).float() + offset])


def _codes_fake(x: Tensor, qtype: str, scheme: str, per_row: bool) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if per_row else 1
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((2, rows), dtype=torch.float32)


define("dynamic_codes(Tensor x, str qtype, str scheme, bool per_row) -> (Tensor, Tensor)", _codes, _codes_fake)


def dynamic_codes(x: Tensor, qtype: str, scheme: str, per_row: bool) -> tuple[Tensor, Tensor]:
    """The codes of a layer's input, with a range of its own. Call target of the lowered graph.

    Args:
        x: [*, n], any float dtype and layout.
        qtype: An integer format of up to 8 bits.
        scheme: "symmetric" or "asymmetric".
        per_row: A scale for each row, not one for all.

    Returns:
        codes uint8 [*, n], dense (a signed format's are 128 higher); scales and zero points of them, float32 [2, rows]
        or [2, 1].
    """
    if type(x) is Tensor and not is_watched():
        return _codes(x, qtype, scheme, per_row)
    found: tuple[Tensor, Tensor] = torch.ops.inc_onednn.dynamic_codes(x, qtype, scheme, per_row)
    return found


# -------------------------------------------------------------------------------------------------------------- layers
class DynamicLayer(PackedLayer):
    """A quantized linear layer for inputs as `dynamic_codes` makes them. Immutable.

    Args:
        weight: Packed; other layers may share it.
        weight_sums: float32 [out]: the sum of each row of the weight's codes, times its scale.
        bias: float32 [out] or None.
        zero_point: Of all inputs, as they are in memory; None: each comes with its own.
        activation: One of `ACTIVATIONS`, computed at the end.
        dtype: Of the result.
        codes: (qtype, scheme) of a result that is quantized by row.
        counted: Whether `nbytes` counts the weight: False if another layer does.
    """

    def __init__(
        self,
        weight: PackedWeight,
        weight_sums: Tensor,
        bias: Tensor | None,
        zero_point: int | None,
        activation: str = "none",
        dtype: torch.dtype = torch.float32,
        codes: tuple[str, str] | None = None,
        counted: bool = True,
    ) -> None:
        self.weight, self.bias, self.zero_point = weight, bias, zero_point
        self.weight_sums = weight_sums if zero_point is None else None
        self.activation, self.dtype, self.codes, self._counted = activation, dtype, codes, counted
        self.shape = weight.shape
        self._head = (1.0, zero_point or 0, weight.tensor, weight.scale, weight.zero)
        self._rest = (None, 1.0, 0, torch.float32, "none", [], "")

    def run(self, x: Tensor, params: Tensor, other: Tensor | None = None) -> Any:
        """The layer on codes [*, in] and their parameters; `other` [*, out] is added before the activation."""
        shape = [*x.shape[:-1], self.shape[0]]
        if not x.numel():
            return self.empty_out(x, params)
        taken["gemm"] += 1
        sums = onednn.qlinear_pointwise.default(x.view(-1, x.shape[-1]), *self._head, *self._rest)
        native = _native(sums) if self.dtype in TYPES else None
        other = None if other is None else other.reshape(sums.shape).contiguous()
        if native is not None:
            taken["native"] += 1
            codes = None if self.codes is None else (self.codes[0], self.codes[1] == "symmetric")
            rest = (self.activation, self.dtype, other, codes)
            y: Any = native.finish(sums, params, self.weight_sums, self.bias, *rest)
        else:
            y = self._finish(sums, params, other)
        return y.view(shape) if self.codes is None else (y[0].view(shape), y[1])

    def _finish(self, sums: Tensor, params: Tensor, other: Tensor | None) -> Any:
        """As the compiled pass, in several."""
        taken["torch"] += 1
        scale, zero = params[0, :, None], params[1, :, None]
        y = sums if self.weight_sums is None else sums.sub_(zero * self.weight_sums)
        y = y.mul_(scale)
        y = y if self.bias is None else y.add_(self.bias)
        y = y if other is None else y.add_(other)
        y = _FUNCTIONS[self.activation](y).to(self.dtype)
        return y if self.codes is None else _codes_by_torch(y, *self.codes, True)

    def empty_out(self, x: Tensor, params: Tensor) -> Any:
        """An output of the right shape and dtype, not filled (for shape propagation)."""
        shape = [*x.shape[:-1], self.shape[0]]
        if self.codes is None:
            return x.new_empty(shape, dtype=self.dtype)
        return x.new_empty(shape, dtype=torch.uint8), params.new_empty((2, x.numel() // x.shape[-1]))

    def nbytes(self) -> int:
        """Bytes of the bias and sums, and of the packed weight unless another layer counts it."""
        own = sum(t.nbytes for t in (self.bias, self.weight_sums) if t is not None)
        return own + (self.weight.nbytes() if self._counted else 0)

    def __repr__(self) -> str:
        fused = [self.activation] if self.activation != "none" else []
        return f"DynamicLayer({' + '.join([f'linear {list(self.shape)}', *fused])} -> {self.codes or self.dtype})"


_FUNCTIONS: dict[str, Any] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}

if HAS_OPAQUE:
    _onednn.register_opaque_type(DynamicLayer, typ="reference")
    _type = _onednn.get_opaque_type_name(DynamicLayer)
    define(
        f"dynamic_layer(Tensor x, Tensor params, {_type} layer) -> Tensor",
        lambda x, params, layer: real(layer).run(x, params),
        lambda x, params, layer: real(layer).empty_out(x, params),
    )
    define(
        f"dynamic_layer_add(Tensor x, Tensor params, Tensor other, {_type} layer) -> Tensor",
        lambda x, params, other, layer: real(layer).run(x, params, other),
        lambda x, params, other, layer: real(layer).empty_out(x, params),
    )
    define(
        f"dynamic_layer_codes(Tensor x, Tensor params, {_type} layer) -> (Tensor, Tensor)",
        lambda x, params, layer: real(layer).run(x, params),
        lambda x, params, layer: real(layer).empty_out(x, params),
    )
else:
    DynamicLayer.run = torch.compiler.disable(DynamicLayer.run)  # type: ignore[method-assign]


def dynamic_layer(x: Tensor, params: Tensor, layer: DynamicLayer) -> Any:
    """Run a layer on what `dynamic_codes` gives."""
    if packed_as_operator(HAS_OPAQUE):
        return torch.ops.inc_onednn.dynamic_layer(x, params, layer)
    return layer.run(x, params)


def dynamic_layer_add(x: Tensor, params: Tensor, other: Tensor, layer: DynamicLayer) -> Any:
    """Run a layer and add `other`, of the dtype of the result, before its activation."""
    if packed_as_operator(HAS_OPAQUE):
        return torch.ops.inc_onednn.dynamic_layer_add(x, params, other, layer)
    return layer.run(x, params, other)


def dynamic_layer_codes(x: Tensor, params: Tensor, layer: DynamicLayer) -> Any:
    """Run a layer whose result is quantized by row: codes and parameters as from `dynamic_codes`."""
    if packed_as_operator(HAS_OPAQUE):
        return torch.ops.inc_onednn.dynamic_layer_codes(x, params, layer)
    return layer.run(x, params)
