"""Claims on layers whose weight is quantized and whose input is not.

    unpack(bytes) -> dequantize -> linear(x, ., bias)      becomes one weight_only_linear on the same tensors
    unpack(bytes) -> dequantize -> embedding(., index)     looks up the rows that are asked for
    unpack(bytes) -> dequantize -> anything else           is dequantized by compiled code at each call

A scale may be computed: one that is quantized itself is dequantized before the layer runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from inc_graph.errors import ConfigError
from inc_graph.graph import dtype, insert_call, is_float, replace_uses, shape, val
from inc_graph.lowering._weight_only import dequantize_weight, fast_dtype, lookup, weight_only_linear
from inc_graph.lowering.base import Claim
from inc_graph.oppattern import argument
from inc_graph.ops import DEQUANTIZE, is_dequantize, is_unpack
from inc_graph.pattern import Match, P
from inc_graph.qtypes import get_qtype

__all__ = [
    "FORMATS", "LOOKUP", "WEIGHT_ONLY", "WEIGHT_VALUES", "Stored", "check_linear", "choose_dtype", "compute_dtype_of",
    "stored",
]  # fmt: skip

aten = torch.ops.aten

FORMATS = (*(f"{sign}int{n}" for n in range(2, 9) for sign in ("", "u")), "nf4", "fp4", "fp4_bnb", "fp8_e4m3",
           "fp8_e5m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8")  # fmt: skip
"""Number formats of weights that the operators take."""
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Stored:
    """A quantized constant as the lowered operators take it: reads of its tensors, and what they mean."""

    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    block: tuple[int, ...]
    qtype: str
    shape: tuple[int, ...]

    def args(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.zero_point


def choose_dtype(x: torch.dtype, wanted: torch.dtype | None = None, fast: torch.dtype | None = None) -> torch.dtype:
    """What a layer with inputs of dtype `x` is computed in: `wanted`, else `INC_COMPUTE_DTYPE`, else the fast one.

    `fast`: what the device is fast at; None: what this processor is.

    Raises:
        ConfigError: `INC_COMPUTE_DTYPE` names no floating point dtype.
    """
    if wanted is not None:
        return wanted
    name = os.environ.get("INC_COMPUTE_DTYPE", "").strip().lower()
    if name and name not in _DTYPES:
        raise ConfigError(f"INC_COMPUTE_DTYPE={name!r} is not a dtype", hint=f"one of {', '.join(_DTYPES)}")
    if name:
        return _DTYPES[name]
    return x if x == torch.float64 else fast or fast_dtype()


def compute_dtype_of(c: Any, layer: fx.Node, fast: torch.dtype | None = None) -> torch.dtype:
    """`choose_dtype` for a layer: the user's word for it (see `quantization.compute_dtype`) is above the backend's."""
    said = c.gm.meta.get("compute_dtype")
    wanted = said(layer) if said is not None else None
    return choose_dtype(val(argument(layer, 0)).dtype, wanted or getattr(c, "compute_dtype", None), fast)


def stored(values: Any, device: str = "cpu") -> Stored | str | None:
    """The constant behind a dequantize node; the reason why it is none; None if it is not dequantized at all.

    `device`: the kind that the kernels run on.
    """
    if not (isinstance(values, fx.Node) and is_dequantize(values)):
        return None
    codes, scale, zero, block, qtype = (argument(values, i) for i in range(5))
    name, size = str(qtype), tuple(shape(values) or ())
    if get_qtype(name).storage_bits > 8:
        return f"a weight of {name}; the kernels take up to 8 bits"
    if is_unpack(codes):
        codes = codes.args[0]
    elif (qt := get_qtype(name)).storage_bits < 8:
        if not qt.is_int:
            return f"{name} codes that are not packed"
        name = "int8" if qt.signed else "uint8"  # one a byte: the same numbers
    if codes.op != "get_attr":
        return "its weight is not a constant"
    if val(codes).device.type != device:
        return f"its weight is on {val(codes).device}; the kernel runs on {'the CPU' if device == 'cpu' else device}"
    if not all(isinstance(n, int) for n in (*block, *size)):
        return "the shape of its weight is not known before it runs"
    return Stored(codes, scale, zero, tuple(block), name, size)


def _of(c: Any, values: Any) -> Stored | str | None:
    return stored(values, getattr(c, "device", "cpu"))


# ------------------------------------------------------------------------------------------------------------- linear
def check_linear(c: Any, found: Match) -> str | None:
    """For the claim of a backend on a linear layer with float inputs."""
    x, weight = argument(found.root, 0), _of(c, argument(found.root, 1))
    if weight is None:
        return ""
    if isinstance(weight, str):
        return weight
    return "" if not is_float(x) or is_dequantize(x) else None  # of quantized inputs the int8 layers have spoken


def _rewrite_linear(c: Any, found: Match) -> Any:
    node = found.root
    x, w, kind = argument(node, 0), stored(argument(node, 1)), compute_dtype_of(c, node)
    assert isinstance(w, Stored)
    args = (x, *w.args(), argument(node, 2), list(w.block), w.qtype, kind)
    replace_uses(node, insert_call(c.gm, weight_only_linear, args, before=node, like=node))
    return f"weight-only {w.qtype} linear, {str(kind).removeprefix('torch.')}"


# ------------------------------------------------------------------------------------------------------------- tables
def _check_lookup(c: Any, found: Match) -> str | None:
    table = _of(c, argument(found.root, 0))
    return "" if table is None else table if isinstance(table, str) else None


def _rewrite_lookup(c: Any, found: Match) -> Any:
    node = found.root
    w = _of(c, argument(node, 0))
    assert isinstance(w, Stored)
    args = (argument(node, 1), *w.args(), list(w.block), w.qtype, w.shape[1], dtype(node))
    replace_uses(node, insert_call(c.gm, lookup, args, before=node, like=node))
    return f"weight-only {w.qtype} lookup"


# ------------------------------------------------------------------------------------------------------------- values
def _check_values(c: Any, found: Match) -> str | None:
    w = _of(c, found.root)
    return None if isinstance(w, Stored) and len(w.shape) > 1 else ""


def _rewrite_values(c: Any, found: Match) -> None:
    node, w = found.root, _of(c, found.root)
    assert isinstance(w, Stored)
    args = (*w.args(), list(w.block), w.qtype, list(w.shape), argument(node, 5))
    replace_uses(node, insert_call(c.gm, dequantize_weight, args, before=node, like=node))


WEIGHT_ONLY = Claim("weight-only linear", P(aten.linear.default), _rewrite_linear, check_linear)
LOOKUP = Claim("weight-only lookup", P(aten.embedding.default), _rewrite_lookup, _check_lookup)
WEIGHT_VALUES = Claim("dequantize weight", P(DEQUANTIZE), _rewrite_values, _check_values, kernel=False)
