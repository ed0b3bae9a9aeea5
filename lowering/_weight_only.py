"""Layers with quantized weights and float inputs on the CPU, as operators on plain tensors.

The tensors are those of the Q-DQ graph: packed codes, scales, zero points. Nothing is repacked, so both graphs share
them. Which way a linear layer is computed is chosen by its rows when it runs:

* few rows: one pass over the codes (`_weight_only.c`), sums in float32;
* some, in bfloat16: eight output channels at a time become values in the first cache, and all rows pass by;
* many: some hundred output channels at a time become bfloat16 (or float32) values in a buffer that stays in the cache,
  and torch multiplies with that;
* without compiled code, on another device, or in float16 and float64: torch operators make those values.

`taken` counts the ways, for tests and benchmarks.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inc_graph import numerics
from inc_graph.errors import SpecError
from inc_graph.fast import fast_dtype
from inc_graph.lowering._direct import is_direct, is_transformed
from inc_graph.lowering._weight_only_native import Kernels, kernels
from inc_graph.native import memory
from inc_graph.packing import check_packed, unpack
from inc_graph.qtypes import QType, get_qtype

__all__ = ["dequantize_weight", "fast_dtype", "lookup", "taken", "weight_only_linear"]

FEW = 16
"""Rows up to which the codes are read once and no value is ever written."""
SOME = 1024
"""Rows up to which the compiled product in bfloat16 is faster than torch's: with more, x leaves the second cache."""
_BUFFER = 4 << 20  # bytes of values at a time: a part of the last cache

taken: Counter[str] = Counter()


# ----------------------------------------------------------------------------------------------------------- linear
def weight_only_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    block: Sequence[int],
    qtype: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    """`x @ W.T + bias` with `W = (codes - zero_point) * scale`. Call target of the lowered graph.

    Args:
        x: [*, in], any float dtype.
        codes: uint8 [out, packed_size(in)], or of the format's carrier dtype [out, in] where that has 8 bits.
        scale: Floating point [ceil(out / block[0]), ceil(in / block[1])].
        zero_point: Of the same shape, or None.
        bias: [out] or None.
        block: Entries of W that share a scale; -1 stands for all.
        qtype: Number format of the codes.
        compute_dtype: Of W and x while they are multiplied.

    Returns:
        [*, out] of x's dtype.
    """
    if is_direct(x) and not (
        torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        return _linear(x, codes, scale, zero_point, bias, block, qtype, compute_dtype)
    if is_transformed():
        shape = (codes.shape[0], x.shape[-1])
        weight = dequantize_weight(codes, scale, zero_point, block, qtype, shape, compute_dtype)
        return F.linear(x.to(compute_dtype), weight, None if bias is None else bias.to(compute_dtype)).to(x.dtype)
    return torch.ops.inc_cpu.weight_only_linear(x, codes, scale, zero_point, bias, block, qtype, compute_dtype)


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    block: Sequence[int],
    qtype: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    qt, cols, rows = get_qtype(qtype), x.shape[-1], codes.shape[0]
    _check(codes, scale, zero_point, block, qt, (rows, cols))
    flat = x.reshape(-1, cols)
    native = kernels() if compute_dtype in (torch.bfloat16, torch.float32) else None
    if native is not None and not native.takes(qt, flat, codes, scale, zero_point):
        native = None
    narrow = native is not None and native.bf16_rows and compute_dtype == torch.bfloat16
    if native is not None and flat.shape[0] <= (SOME if narrow else FEW):
        taken["few rows" if flat.shape[0] <= FEW else "some rows"] += 1
        kind = torch.bfloat16 if narrow else torch.float32
        wanted = x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32
        y = memory(*x.shape[:-1], rows, dtype=wanted)
        native.multiply(y.view(-1, rows), flat.to(kind).contiguous(), codes, scale, zero_point, bias, block, qt)
    else:
        taken["many rows" if native is not None else "torch"] += 1
        inputs = flat.to(compute_dtype).contiguous()
        shift = None if bias is None else bias.to(compute_dtype)
        y = x.new_empty(*x.shape[:-1], rows)
        _by_parts(y.view(-1, rows), inputs, codes, scale, zero_point, shift, block, qt, native)
    return y.to(x.dtype)  # no view: what is one must not be changed in place when gradients are wanted


def _by_parts(
    out: Tensor,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    block: Sequence[int],
    qt: QType,
    native: Kernels | None,
) -> None:
    rows, cols = codes.shape[0], x.shape[1]
    height = rows if block[0] < 0 else block[0]
    step = max(1, _BUFFER // (height * max(cols, 1) * x.element_size())) * height  # whole blocks
    buffer = _buffer(min(step, rows), cols, x.dtype) if native is not None else None
    for r in range(0, rows, step):
        part = slice(r, min(r + step, rows))
        above = slice(r // height, -(-part.stop // height))
        zero = None if zero_point is None else zero_point[above]
        if buffer is not None and native is not None:
            weight = buffer[: part.stop - r]
            native.unpack(weight, codes[part], scale[above], zero, block, qt)
        else:
            weight = _values(codes[part], scale[above], zero, block, qt, (part.stop - r, cols), x.dtype)
        out[:, part] = F.linear(x, weight, None if bias is None else bias[part])


_spare = threading.local()


def _buffer(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Memory for some rows of a weight, the same at each call of a thread: fresh pages take time."""
    size = rows * cols * dtype.itemsize
    if size > _BUFFER:  # one row of blocks is larger
        return memory(rows, cols, dtype=dtype)
    if not hasattr(_spare, "bytes"):
        _spare.bytes = memory(_BUFFER, dtype=torch.uint8)
    return _spare.bytes[:size].view(dtype).view(rows, cols)


# --------------------------------------------------------------------------------------------------- weights and rows
def dequantize_weight(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block: Sequence[int],
    qtype: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The real values of a constant of any rank, as `inc::dequantize` gives them. Call target of the lowered graph.

    Args: as for `weight_only_linear`; `shape` is that of the values, `dtype` theirs.
    """
    return torch.ops.inc_cpu.dequantize_weight(codes, scale, zero_point, block, qtype, shape, dtype)


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block: Sequence[int],
    qtype: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    qt = get_qtype(qtype)
    _check(codes, scale, zero_point, block, qt, shape)
    flat = _as_matrix(shape, block, qt)
    native = kernels() if flat is not None and codes.device.type == "cpu" else None
    if flat is None or native is None or not native.takes(qt, codes, scale, zero_point):
        taken["torch values"] += 1
        return _values(codes, scale, zero_point, block, qt, shape, dtype)
    taken["values"] += 1
    (rows, cols), pair = flat
    out = memory(rows, cols, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    across = -(-cols // (cols if pair[1] < 0 else pair[1]))
    scale, zero_point = scale.reshape(-1, across), None if zero_point is None else zero_point.reshape(-1, across)
    native.unpack(out, codes.reshape(rows, -1), scale, zero_point, pair, qt)
    return out.reshape(tuple(shape)).to(dtype)


def _as_matrix(shape: Sequence[int], block: Sequence[int], qt: QType) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(shape, block) of a tensor as a matrix of the same codes and scales in the same order; None if there is none.

    The last dimensions, if they are whole in a block and rows of them end on a byte, are one; so are all before them.
    """
    sizes = [n if b < 0 or b > n else b for n, b in zip(shape, block, strict=True)]
    if len(shape) < 2 or 0 in shape:
        return None
    cols, wide, d = shape[-1], sizes[-1], len(shape) - 1
    while d > 1 and wide == cols and cols * qt.storage_bits % 8 == 0:
        d -= 1
        cols, wide = cols * shape[d], wide * sizes[d]
    # Rows: only the innermost dimension with blocks above 1 may be cut, those within it are whole.
    tall, whole = 1, True
    for n, size in zip(reversed(shape[:d]), reversed(sizes[:d]), strict=True):
        if whole:
            tall, whole = tall * size, size == n
            if not whole and n % size and d > 1:
                return None  # a ragged block inside
        elif size != 1:
            return None
    rows = 1
    for n in shape[:d]:
        rows *= n
    return (rows, cols), (tall, wide)


def lookup(
    index: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block: Sequence[int],
    qtype: str,
    dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a quantized table: the codes of those rows are read, and no others. Call target of the lowered graph.

    index int [*]; codes, scale, zero_point and block as for `weight_only_linear` -> [*, dim] of `dtype`.
    """
    rows = index.reshape(-1)
    above = torch.zeros_like(rows) if block[0] < 0 else rows if block[0] == 1 else rows // block[0]
    some = codes.view(torch.uint8) if codes.dtype.itemsize == 1 and codes.is_floating_point() else codes
    picked = some.index_select(0, rows).view(codes.dtype)
    zero = None if zero_point is None else zero_point.index_select(0, above)
    values = dequantize_weight(
        picked, scale.index_select(0, above), zero, [1, block[1]], qtype, [rows.shape[0], dim], dtype
    )
    return values.reshape(*index.shape, dim)


# --------------------------------------------------------------------------------------------------- by torch operators
def _values(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block: Sequence[int],
    qt: QType,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    carriers = unpack(codes, qt, shape) if qt.storage_bits < 8 else codes
    return numerics.dequantize(carriers, scale, zero_point, block, qt, dtype).contiguous()


def _check(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qt: QType, shape: Sequence[int]
) -> None:
    """Compiled code reads what it is told to: raise SpecError where the shapes do not fit."""
    if qt.storage_bits < 8:
        check_packed(codes, qt, shape)
    elif codes.dtype != qt.carrier or tuple(codes.shape) != tuple(shape):
        want = f"{qt.carrier} {list(shape)}"
        raise SpecError(f"{qt.name} codes must be {want}, not {codes.dtype} {list(codes.shape)}")
    numerics.check_layout(shape, scale, zero_point, block)


# ----------------------------------------------------------------------------------------------------------- operators
_library = torch.library.Library("inc_cpu", "FRAGMENT")
_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero_point"
_library.define(
    f"weight_only_linear(Tensor x, {_WEIGHT}, Tensor? bias, SymInt[] block, str qtype, ScalarType compute_dtype)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"dequantize_weight({_WEIGHT}, SymInt[] block, str qtype, SymInt[] shape, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("weight_only_linear", _linear, "CompositeExplicitAutograd")
_library.impl("dequantize_weight", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("inc_cpu::weight_only_linear", lib=_library)
def _linear_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    block: Sequence[int],
    qtype: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, zero_point, block, get_qtype(qtype), (codes.shape[0], x.shape[-1]))
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("inc_cpu::dequantize_weight", lib=_library)
def _dequantize_fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block: Sequence[int],
    qtype: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, zero_point, block, get_qtype(qtype), shape)
    return codes.new_empty(tuple(shape), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero_point, bias, ctx.block, ctx.qtype, ctx.compute_dtype = inputs
    ctx.cols, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """To the input and the bias; codes and scales are not trained."""
    codes, scale, zero_point = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        shape = (codes.shape[0], ctx.cols)
        weight = dequantize_weight(codes, scale, zero_point, ctx.block, ctx.qtype, shape, ctx.compute_dtype)
        grad_x = (grad.to(ctx.compute_dtype) @ weight).to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("inc_cpu::weight_only_linear", _backward, setup_context=_save, lib=_library)
