"""The steps of LSTM and GRU with quantized weights: all in one compiled call where the weights are int8, else a product
of few rows with the codes, then the cell, step by step.

gates, h, c, dequantize(w) -> lstm_steps        becomes one call that reads codes and scales as they are stored
gates, h, dequantize(w), bias -> gru_steps
dequantize(w) -> projection                     is read by the steps

`taken` counts the ways, for tests and benchmarks: "native" and "loop".
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inc_graph.graph import insert_call, replace_uses
from inc_graph.lowering._onednn import define
from inc_graph.lowering._recurrent_native import Steps, steps
from inc_graph.lowering._weight_only import weight_only_linear
from inc_graph.lowering._weight_only_claims import Stored, compute_dtype_of, stored
from inc_graph.lowering.base import Claim
from inc_graph.oppattern import argument
from inc_graph.pattern import Match, P
from inc_graph.recurrent import GRU_STEPS, LSTM_STEPS, PROJECTION, gru_steps, lstm_steps

__all__ = ["GRU", "LSTM", "PROJECT", "gru", "lstm", "taken"]

taken: Counter[str] = Counter()
Weight = tuple[Tensor, Tensor, Tensor | None, Sequence[int], str]


def _product(w: Weight, bias: Tensor | None, dtype: torch.dtype) -> Any:
    return lambda x: weight_only_linear(x, *w[:3], bias, *w[3:], dtype)


def _native(
    gates: Tensor, h: Tensor, codes: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str,
    dtype: torch.dtype,
) -> Steps | None:  # fmt: skip
    """The compiled steps, if they are for weights like these; another dtype to compute in than theirs was asked for."""
    plain = dtype == torch.float32 and qtype == "int8" and codes.ndim == 2
    found = steps() if plain and Steps.takes(gates, h, codes, zero_point, block) else None
    taken["native" if found else "loop"] += 1
    return found


def _lstm(
    gates: Tensor, h: Tensor, c: Tensor,
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str,
    codes_2: Tensor | None, scale_2: Tensor | None, zero_point_2: Tensor | None, block_2: Sequence[int], qtype_2: str,
    projection: Tensor | None, batch_sizes: Tensor | None, reverse: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    native = _native(gates, h, codes, zero_point, block, qtype, dtype)
    if native is not None and codes_2 is None and projection is None:
        return native(gates, h, c, codes, scale, None, reverse, batch_sizes)
    product = _product((codes, scale, zero_point, block, qtype), None, dtype)
    project = None
    if codes_2 is not None and scale_2 is not None:
        project = _product((codes_2, scale_2, zero_point_2, block_2, qtype_2), None, dtype)
    elif projection is not None:
        project = functools.partial(_linear, projection)
    return lstm_steps(gates, h, c, product, reverse, batch_sizes, project)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _gru(
    gates: Tensor, h: Tensor,
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, block: Sequence[int], qtype: str,
    bias: Tensor | None, batch_sizes: Tensor | None, reverse: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    native = _native(gates, h, codes, zero_point, block, qtype, dtype)
    if native is not None:
        return native(gates, h, None, codes, scale, bias, reverse, batch_sizes)
    product = _product((codes, scale, zero_point, block, qtype), bias, dtype)
    return gru_steps(gates, h, product, reverse, batch_sizes)


_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero_point, SymInt[] block, str qtype"
_SECOND = "Tensor? codes_2, Tensor? scale_2, Tensor? zero_point_2, SymInt[] block_2, str qtype_2, Tensor? projection"
_REST = "Tensor? batch_sizes, bool reverse, ScalarType dtype) -> Tensor"
define(f"lstm(Tensor gates, Tensor h, Tensor c, {_WEIGHT}, {_SECOND}, {_REST}", _lstm,
       lambda gates, h, c, *rest: gates.new_empty(*gates.shape[:-1], h.shape[1] + c.shape[1]))  # fmt: skip
define(f"gru(Tensor gates, Tensor h, {_WEIGHT}, Tensor? bias, {_REST}", _gru,
       lambda gates, h, *rest: gates.new_empty(*gates.shape[:-1], h.shape[1]))  # fmt: skip


def lstm(*args: Any) -> Any:
    """`inc::lstm_steps` on a weight's codes. Call target of the lowered graph."""
    return torch.ops.inc_onednn.lstm(*args)


def gru(*args: Any) -> Any:
    """`inc::gru_steps` on a weight's codes. Call target of the lowered graph."""
    return torch.ops.inc_onednn.gru(*args)


def _check(position: int) -> Any:
    def check(c: Any, found: Match) -> str | None:
        w = stored(argument(found.root, position))
        return "" if w is None else w if isinstance(w, str) else None

    return check


def _weight(w: Stored) -> tuple[Any, ...]:
    return (*w.args(), list(w.block), w.qtype)


def _rewrite_lstm(c: Any, found: Match) -> str:
    node = found.root
    w = stored(argument(node, 3))
    assert isinstance(w, Stored)
    second, projection = _second(argument(node, 6))
    args = (*node.args[:3], *_weight(w), *second, projection, argument(node, 5), argument(node, 4),
            compute_dtype_of(c, node, torch.float32))  # fmt: skip
    replace_uses(node, insert_call(c.gm, lstm, args, before=node, like=node))
    return f"steps with {w.qtype} weights"


def _second(projection: Any) -> tuple[tuple[Any, ...], Any]:
    """(the codes of a projection, its values where they are not codes that the kernel reads)."""
    w = stored(projection.args[0]) if projection is not None else None
    if isinstance(w, Stored):
        return _weight(w), None
    return (None, None, None, [], ""), projection


def _rewrite_gru(c: Any, found: Match) -> str:
    node = found.root
    w = stored(argument(node, 2))
    assert isinstance(w, Stored)
    args = (*node.args[:2], *_weight(w), argument(node, 3), argument(node, 5), argument(node, 4),
            compute_dtype_of(c, node, torch.float32))  # fmt: skip
    replace_uses(node, insert_call(c.gm, gru, args, before=node, like=node))
    return f"steps with {w.qtype} weights"


def _check_projection(c: Any, found: Match) -> str | None:
    node = found.root
    if not all(u.target is LSTM_STEPS and isinstance(stored(argument(u, 3)), Stored) for u in node.users):
        return ""
    return _check(0)(c, found)


def _rewrite_projection(c: Any, found: Match) -> str:
    """The claim on the steps does it."""
    w = stored(argument(found.root, 0))
    assert isinstance(w, Stored)
    return f"of the state of the steps, with {w.qtype} weights"


PROJECT = Claim("projection", P(PROJECTION), _rewrite_projection, _check_projection)
LSTM = Claim("lstm steps", P(LSTM_STEPS), _rewrite_lstm, _check(3))
GRU = Claim("gru steps", P(GRU_STEPS), _rewrite_gru, _check(2))
