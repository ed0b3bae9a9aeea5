"""The steps of LSTM and GRU with quantized weights: a product of few rows with the codes, then the cell, step by step.

gates, h, c, dequantize(w) -> lstm_steps        becomes one call that reads codes and scales as they are stored
gates, h, dequantize(w), bias -> gru_steps
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inc_graph.graph import insert_call, replace_uses
from inc_graph.lowering._onednn import define
from inc_graph.lowering._weight_only import weight_only_linear
from inc_graph.lowering._weight_only_claims import Stored, compute_dtype_of, stored
from inc_graph.lowering.base import Claim
from inc_graph.oppattern import argument
from inc_graph.pattern import Match, P
from inc_graph.recurrent import GRU_STEPS, LSTM_STEPS, gru_steps, lstm_steps

__all__ = ["GRU", "LSTM", "gru", "lstm"]


def _lstm(
    gates: Tensor, h: Tensor, c: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None,
    block: Sequence[int], qtype: str, reverse: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    def product(h: Tensor) -> Tensor:
        return weight_only_linear(h, codes, scale, zero_point, None, block, qtype, dtype)

    return lstm_steps(gates, h, c, product, reverse)


def _gru(
    gates: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    block: Sequence[int], qtype: str, reverse: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    def product(h: Tensor) -> Tensor:
        return weight_only_linear(h, codes, scale, zero_point, bias, block, qtype, dtype)

    return gru_steps(gates, h, product, reverse)


_CODES = "Tensor codes, Tensor scale, Tensor? zero_point"
_REST = "SymInt[] block, str qtype, bool reverse, ScalarType dtype) -> Tensor"
define(f"lstm(Tensor gates, Tensor h, Tensor c, {_CODES}, {_REST}", _lstm,
       lambda gates, h, *rest: gates.new_empty(gates.shape[0], h.shape[0], 2 * h.shape[1]))  # fmt: skip
define(f"gru(Tensor gates, Tensor h, {_CODES}, Tensor? bias, {_REST}", _gru,
       lambda gates, h, *rest: gates.new_empty(gates.shape[0], h.shape[0], h.shape[1]))  # fmt: skip


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


def _rewrite_lstm(c: Any, found: Match) -> str:
    node = found.root
    w = stored(argument(node, 3))
    assert isinstance(w, Stored)
    kind = compute_dtype_of(c, node, torch.float32)
    args = (*node.args[:3], *w.args(), list(w.block), w.qtype, argument(node, 4), kind)
    replace_uses(node, insert_call(c.gm, lstm, args, before=node, like=node))
    return f"steps with {w.qtype} weights"


def _rewrite_gru(c: Any, found: Match) -> str:
    node = found.root
    w = stored(argument(node, 2))
    assert isinstance(w, Stored)
    kind = compute_dtype_of(c, node, torch.float32)
    args = (*node.args[:2], *w.args(), argument(node, 3), list(w.block), w.qtype, argument(node, 4), kind)
    replace_uses(node, insert_call(c.gm, gru, args, before=node, like=node))
    return f"steps with {w.qtype} weights"


LSTM = Claim("lstm steps", P(LSTM_STEPS), _rewrite_lstm, _check(3))
GRU = Claim("gru steps", P(GRU_STEPS), _rewrite_gru, _check(2))
