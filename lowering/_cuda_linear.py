"""Linear layers with quantized weights and float inputs on a GPU, as one operator.

Which way is taken is chosen by the rows when it runs:

* few rows, and a weight in the tensor core layout (`_cuda_layout`): torch's kernel reads each code once;
* else: the weight becomes bfloat16 (or `compute_dtype`) values by torch operators, and torch multiplies with these.

Under torch.compile the operator is not seen but what is in it: the rows are a guard then, and inductor makes one
kernel of the operators that unpack, scale and cast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inc_graph import numerics
from inc_graph.lowering._cuda_layout import nibbles
from inc_graph.lowering._weight_only import _check, _values
from inc_graph.qtypes import get_qtype

__all__ = ["FEW", "cuda_linear", "taken"]

FEW = 64
"""Rows up to which the packed kernel is taken: its time grows with each 16 rows, that of a matrix product does not."""

taken: Counter[str] = Counter()
"""Ways that were taken, for tests."""


def cuda_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    pairs: Tensor | None,
    bias: Tensor | None,
    block: Sequence[int],
    qtype: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    """`x @ W.T + bias` with `W = (codes - zero_point) * scale`. Call target of the lowered graph.

    Args:
        x: [*, in], any float dtype.
        codes: With `pairs` the weight in the tensor core layout, else as the Q-DQ graph has it.
        scale, zero_point, block, qtype: As for `_weight_only.weight_only_linear`.
        pairs: Scales and zeros of the tensor core kernel, bfloat16 [groups, out, 2]; None: it is not used.
        bias: [out] or None.
        compute_dtype: Of W and x while they are multiplied; bfloat16 with `pairs`.

    Returns:
        [*, out] of x's dtype.
    """
    args = (x, codes, scale, zero_point, pairs, bias, block, qtype, compute_dtype)
    trained = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if trained:  # its backward keeps no values of W
        return torch.ops.inc_cuda.weight_only_linear(*args)
    if torch.compiler.is_dynamo_compiling():
        inline = not _exporting()  # an exported program serves all rows
    else:
        inline = type(x) is Tensor and not torch.compiler.is_compiling()
    if inline:
        return _linear(*args)
    return torch.ops.inc_cuda.weight_only_linear(*args)


def _exporting() -> bool:
    """`torch.compiler.is_exporting()` says yes of all that dynamo traces, in older versions."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    pairs: Tensor | None,
    bias: Tensor | None,
    block: Sequence[int],
    qtype: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    rows, cols = flat.shape
    inputs = flat.to(compute_dtype)
    if pairs is not None and 0 < rows <= FEW:
        _count("packed")
        y = torch.ops.aten._weight_int4pack_mm(inputs.contiguous(), codes, cols // pairs.shape[0], pairs).to(x.dtype)
        y = y if bias is None else y + bias.to(x.dtype)
    else:
        _count("values")
        weight = _weight(codes, scale, zero_point, pairs is not None, block, qtype, cols, compute_dtype)
        y = F.linear(inputs, weight, None if bias is None else bias.to(compute_dtype)).to(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _weight(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    is_tiled: bool,
    block: Sequence[int],
    qtype: str,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """The real values [out, in], the same bits whichever layout the codes are in."""
    qt = get_qtype(qtype)
    if not is_tiled:
        return _values(codes, scale, zero_point, block, qt, (codes.shape[0], cols), dtype)
    found = nibbles(codes)
    carriers = found.to(torch.int8) - 8 if qt.signed else found
    return numerics.dequantize(carriers, scale, zero_point, block, qt, dtype)


def _count(way: str) -> None:
    if not torch.compiler.is_compiling():
        taken[way] += 1


# ----------------------------------------------------------------------------------------------------------- operator
_library = torch.library.Library("inc_cuda", "FRAGMENT")
_library.define(
    "weight_only_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? pairs, Tensor? bias,"
    " SymInt[] block, str qtype, ScalarType compute_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("weight_only_linear", _linear, "CompositeExplicitAutograd")


@torch.library.register_fake("inc_cuda::weight_only_linear", lib=_library)
def _fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    pairs: Tensor | None,
    bias: Tensor | None,
    block: Sequence[int],
    qtype: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    out = codes.shape[0] if pairs is None else codes.shape[0] * 8
    if pairs is None:
        _check(codes, scale, zero_point, block, get_qtype(qtype), (out, x.shape[-1]))
    return x.new_empty((*x.shape[:-1], out))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero_point, pairs, bias, ctx.block, ctx.qtype, ctx.compute_dtype = inputs
    ctx.cols, ctx.bias_dtype, ctx.is_tiled = x.shape[-1], None if bias is None else bias.dtype, pairs is not None
    ctx.save_for_backward(codes, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """To the input and the bias; codes and scales are not trained. The values of W are made anew."""
    codes, scale, zero_point = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        how = (ctx.is_tiled, ctx.block, ctx.qtype, ctx.cols, ctx.compute_dtype)
        grad_x = (grad.to(ctx.compute_dtype) @ _weight(codes, scale, zero_point, *how)).to(grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("inc_cuda::weight_only_linear", _backward, setup_context=_save, lib=_library)
