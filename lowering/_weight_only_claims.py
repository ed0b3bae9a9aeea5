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

__all__ = ["LOOKUP", "WEIGHT_ONLY", "WEIGHT_VALUES", "choose_dtype", "stored"]

aten = torch.ops.aten

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


def choose_dtype(x: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """What a layer with inputs of dtype `x` is computed in: `wanted`, else `INC_COMPUTE_DTYPE`, else the fast one.

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
    return x if x == torch.float64 else fast_dtype()


def stored(values: Any) -> Stored | str | None:
    """The constant behind a dequantize node; the reason why it is none; None if it is not dequantized at all."""
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
    if val(codes).device.type != "cpu":
        return f"its weight is on {val(codes).device}; the kernel runs on the CPU"
    if not all(isinstance(n, int) for n in (*block, *size)):
        return "the shape of its weight is not known before it runs"
    return Stored(codes, scale, zero, tuple(block), name, size)


# ------------------------------------------------------------------------------------------------------------- linear
def _check_linear(c: Any, found: Match) -> str | None:
    x, weight = argument(found.root, 0), stored(argument(found.root, 1))
    if weight is None:
        return ""
    if isinstance(weight, str):
        return weight
    return "" if not is_float(x) or is_dequantize(x) else None  # of quantized inputs the int8 layers have spoken


def _rewrite_linear(c: Any, found: Match) -> Any:
    node = found.root
    x, w = argument(node, 0), stored(argument(node, 1))
    assert isinstance(w, Stored)
    kind = choose_dtype(dtype(x), getattr(c, "compute_dtype", None))  # type: ignore[arg-type]
    args = (x, *w.args(), argument(node, 2), list(w.block), w.qtype, kind)
    replace_uses(node, insert_call(c.gm, weight_only_linear, args, before=node, like=node))
    return f"weight-only {w.qtype} linear, {str(kind).removeprefix('torch.')}"


# ------------------------------------------------------------------------------------------------------------- tables
def _check_lookup(c: Any, found: Match) -> str | None:
    table = stored(argument(found.root, 0))
    return "" if table is None else table if isinstance(table, str) else None


def _rewrite_lookup(c: Any, found: Match) -> Any:
    node = found.root
    w = stored(argument(node, 0))
    assert isinstance(w, Stored)
    args = (argument(node, 1), *w.args(), list(w.block), w.qtype, w.shape[1], dtype(node))
    replace_uses(node, insert_call(c.gm, lookup, args, before=node, like=node))
    return f"weight-only {w.qtype} lookup"


# ------------------------------------------------------------------------------------------------------------- values
def _check_values(c: Any, found: Match) -> str | None:
    w = stored(found.root)
    return None if isinstance(w, Stored) and len(w.shape) > 1 else ""


def _rewrite_values(c: Any, found: Match) -> None:
    node, w = found.root, stored(found.root)
    assert isinstance(w, Stored)
    args = (*w.args(), list(w.block), w.qtype, list(w.shape), argument(node, 5))
    replace_uses(node, insert_call(c.gm, dequantize_weight, args, before=node, like=node))


WEIGHT_ONLY = Claim("weight-only linear", P(aten.linear.default), _rewrite_linear, _check_linear)
LOOKUP = Claim("weight-only lookup", P(aten.embedding.default), _rewrite_lookup, _check_lookup)
WEIGHT_VALUES = Claim("dequantize weight", P(DEQUANTIZE), _rewrite_values, _check_values, kernel=False)
