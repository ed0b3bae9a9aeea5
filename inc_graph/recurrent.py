"""The recurrent part of LSTM and GRU as operators, once the products with the inputs of all steps are taken out.

    lstm(x)_t  =  cell(W_ih x_t + b_ih + b_hh  +  W_hh h_(t-1))     the first three terms for all t: one linear layer
    gru(x)_t   =  cell(W_ih x_t + b_ih, W_hh h_(t-1) + b_hh)        the first two likewise

* ``inc::lstm_steps(gates [T, N, 4H], h [N, H], c [N, H], weight [4H, H], reverse) -> [T, N, 2H]``: h and c of each
  step; rows of the weight, and gates, are those of the input, forget, cell and output gate;
* ``inc::gru_steps(gates [T, N, 3H], h [N, H], weight [3H, H], bias [3H]?, reverse) -> [T, N, H]``: h of each step;
  reset, update, new.

``reverse`` goes from the last step to the first; results stand where their steps do. The equations are those of
``torch.nn.LSTM`` and ``torch.nn.GRU``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GRU_STEPS", "LSTM_STEPS", "gru_steps", "lstm_steps"]

_library = torch.library.Library("inc", "FRAGMENT")
Product = Callable[[Tensor], Tensor]


def lstm_steps(gates: Tensor, h: Tensor, c: Tensor, product: Product, reverse: bool) -> Tensor:
    """See the head of the file; `product(h)` is `h @ weight.T`."""
    size = h.shape[1]
    out = gates.new_empty(gates.shape[0], h.shape[0], 2 * size)
    for t in _order(gates, reverse):
        i, f, g, o = (product(h) + gates[t]).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out[t, :, :size] = h
        out[t, :, size:] = c
    return out


def gru_steps(gates: Tensor, h: Tensor, product: Product, reverse: bool) -> Tensor:
    """See the head of the file; `product(h)` is `h @ weight.T + bias`."""
    size = h.shape[1]
    out = gates.new_empty(gates.shape[0], h.shape[0], size)
    for t in _order(gates, reverse):
        own, x = product(h), gates[t]
        r, z = (own[:, : 2 * size] + x[:, : 2 * size]).sigmoid().chunk(2, 1)
        new = (x[:, 2 * size :] + r * own[:, 2 * size :]).tanh()
        h = torch.lerp(new, h, z)
        out[t] = h
    return out


def _order(gates: Tensor, reverse: bool) -> range:
    steps = gates.shape[0]
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _lstm(gates: Tensor, h: Tensor, c: Tensor, weight: Tensor, reverse: bool) -> Tensor:
    return lstm_steps(gates, h, c, lambda h: F.linear(h, weight), reverse)


def _gru(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    return gru_steps(gates, h, lambda h: F.linear(h, weight, bias), reverse)


def _lstm_fake(gates: Tensor, h: Tensor, *rest: Any) -> Tensor:
    return gates.new_empty(gates.shape[0], h.shape[0], 2 * h.shape[1])


def _gru_fake(gates: Tensor, h: Tensor, *rest: Any) -> Tensor:
    return gates.new_empty(gates.shape[0], h.shape[0], h.shape[1])


for _schema, _run, _fake in (
    ("lstm_steps(Tensor gates, Tensor h, Tensor c, Tensor weight, bool reverse) -> Tensor", _lstm, _lstm_fake),
    ("gru_steps(Tensor gates, Tensor h, Tensor weight, Tensor? bias, bool reverse) -> Tensor", _gru, _gru_fake),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"inc::{_name}", _fake, lib=_library)

LSTM_STEPS = torch.ops.inc.lstm_steps.default
GRU_STEPS = torch.ops.inc.gru_steps.default
