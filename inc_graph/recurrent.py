"""The recurrent part of LSTM and GRU as operators, once the products with the inputs of all steps are taken out.

    lstm(x)_t  =  cell(W_ih x_t + b_ih + b_hh  +  W_hh h_(t-1))     the first three terms for all t: one linear layer
    gru(x)_t   =  cell(W_ih x_t + b_ih, W_hh h_(t-1) + b_hh)        the first two likewise

* ``inc::lstm_steps(gates [T, N, 4H], h [N, P], c [N, H], weight [4H, P], reverse, batch_sizes?, projection [P, H]?) ->
  [T, N, P + H]``: h and c of each step; rows of the weight, and gates, are those of the input, forget, cell and output
  gate. P is H without a projection;
* ``inc::gru_steps(gates [T, N, 3H], h [N, H], weight [3H, H], bias [3H]?, reverse, batch_sizes?) -> [T, N, H]``: h of
  each step; reset, update, new;
* ``inc::last_step(steps [R, W], state [N, *], batch_sizes [T], reverse) -> [N, W]``: of each sequence its last step;
* ``inc::projection(weight [P, H])``: the weight itself. It makes an operator of the second weight of a step, of which
  rules can speak.

``reverse`` goes from the last step to the first; results stand where their steps do. With ``batch_sizes`` (int64 [T],
on the CPU, falling) gates and results are those of a `PackedSequence`, [R, *]: the rows of step 0, those of step 1, ...
The equations are those of ``torch.nn.LSTM`` and ``torch.nn.GRU``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GRU_STEPS", "LAST_STEP", "LSTM_STEPS", "PROJECTION", "gru_steps", "lstm_steps"]

_library = torch.library.Library("inc", "FRAGMENT")
Product = Callable[[Tensor], Tensor]


def lstm_steps(
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    product: Product,
    reverse: bool,
    batch_sizes: Tensor | None = None,
    project: Product | None = None,
) -> Tensor:
    """See the head of the file; `product(h)` is `h @ weight.T`, `project(h)` `h @ projection.T`."""
    size, out = h.shape[1], gates.new_empty(*gates.shape[:-1], h.shape[1] + c.shape[1])
    rows = out.view(-1, out.shape[-1])
    for part, x in _steps(gates, len(h), reverse, batch_sizes):
        i, f, g, o = (product(h[: len(x)]) + x).chunk(4, 1)
        new_c = f.sigmoid() * c[: len(x)] + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        new_h = new_h if project is None else project(new_h)
        rows[part, :size], rows[part, size:] = new_h, new_c
        h, c = _kept(new_h, h), _kept(new_c, c)
    return out


def gru_steps(gates: Tensor, h: Tensor, product: Product, reverse: bool, batch_sizes: Tensor | None = None) -> Tensor:
    """See the head of the file; `product(h)` is `h @ weight.T + bias`."""
    size, out = h.shape[1], gates.new_empty(*gates.shape[:-1], h.shape[1])
    rows = out.view(-1, size)
    for part, x in _steps(gates, len(h), reverse, batch_sizes):
        before = h[: len(x)]
        own = product(before)
        r, z = (own[:, : 2 * size] + x[:, : 2 * size]).sigmoid().chunk(2, 1)
        new = (x[:, 2 * size :] + r * own[:, 2 * size :]).tanh()
        rows[part] = new = torch.lerp(new, before, z)
        h = _kept(new, h)
    return out


def _steps(gates: Tensor, n: int, reverse: bool, batch_sizes: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(which rows they are, the gates) of each step, in the order in which they are made."""
    rows = gates.reshape(-1, gates.shape[-1])
    sizes = [n] * gates.shape[0] if batch_sizes is None else batch_sizes.tolist()
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()
    for t in range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes)):
        part = slice(ends[t] - sizes[t], ends[t])
        yield part, rows[part]


def _kept(new: Tensor, old: Tensor) -> Tensor:
    """The state after a step that only the first sequences take."""
    return new if len(new) == len(old) else torch.cat([new, old[len(new) :]])


def _lstm(
    gates: Tensor, h: Tensor, c: Tensor, weight: Tensor, reverse: bool,
    batch_sizes: Tensor | None = None, projection: Tensor | None = None,
) -> Tensor:  # fmt: skip
    project = None if projection is None else lambda h: F.linear(h, projection)
    return lstm_steps(gates, h, c, lambda h: F.linear(h, weight), reverse, batch_sizes, project)


def _gru(
    gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, batch_sizes: Tensor | None = None
) -> Tensor:
    return gru_steps(gates, h, lambda h: F.linear(h, weight, bias), reverse, batch_sizes)


def _last(steps: Tensor, state: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    sequences = torch.arange(state.shape[0])
    if reverse:
        return steps[: state.shape[0]].clone()
    lengths = (batch_sizes[:, None] > sequences).sum(0)
    rows = (batch_sizes.cumsum(0) - batch_sizes)[lengths - 1] + sequences
    return steps.index_select(0, rows.to(steps.device))


def _lstm_fake(gates: Tensor, h: Tensor, c: Tensor, *rest: Any) -> Tensor:
    return gates.new_empty(*gates.shape[:-1], h.shape[1] + c.shape[1])


def _gru_fake(gates: Tensor, h: Tensor, *rest: Any) -> Tensor:
    return gates.new_empty(*gates.shape[:-1], h.shape[1])


_PACKED = "Tensor? batch_sizes=None"
_OPERATORS: tuple[tuple[str, Any, Any], ...] = (
    (f"lstm_steps(Tensor gates, Tensor h, Tensor c, Tensor weight, bool reverse, {_PACKED}, Tensor? projection=None)"
     " -> Tensor", _lstm, _lstm_fake),
    (f"gru_steps(Tensor gates, Tensor h, Tensor weight, Tensor? bias, bool reverse, {_PACKED}) -> Tensor",
     _gru, _gru_fake),
    ("last_step(Tensor steps, Tensor state, Tensor batch_sizes, bool reverse) -> Tensor", _last,
     lambda steps, state, *rest: steps.new_empty(state.shape[0], steps.shape[1])),
    ("projection(Tensor weight) -> Tensor", Tensor.clone, torch.empty_like),
)  # fmt: skip
for _schema, _run, _fake in _OPERATORS:
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"inc::{_name}", _fake, lib=_library)

LSTM_STEPS = torch.ops.inc.lstm_steps.default
GRU_STEPS = torch.ops.inc.gru_steps.default
LAST_STEP = torch.ops.inc.last_step.default
PROJECTION = torch.ops.inc.projection.default
