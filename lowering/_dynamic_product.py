"""Products of two activations that are quantized as they come.

    dequantize(a), dequantize(b) -> matmul      with scales and zero points of a and b as `choose_qparams` finds them

An int8 product needs b's scale as a factor of the result: one scale for the whole of it. Where it pays (see `LARGE`),
and there are no batches of b, the codes are multiplied, as signed ones:

    (a - za) (b - zb) = a b - za sum(b) - zb sum(a - za)

A layer's kernel would want b packed, at each call. Else the values of the codes are multiplied as floats; one compiled
pass and a multiplication make them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.graph import insert_call, replace_uses, val
from inc_graph.lowering._context import OneDnnContext
from inc_graph.lowering._dynamic import dynamic_codes, taken
from inc_graph.lowering._dynamic_claims import Chosen, chosen
from inc_graph.lowering._onednn import define
from inc_graph.lowering.base import Claim
from inc_graph.oppattern import argument
from inc_graph.ops import DEQUANTIZE
from inc_graph.pattern import Match, P

__all__ = ["DYNAMIC_PRODUCT", "DYNAMIC_VALUES", "LARGE", "dynamic_product", "dynamic_values"]

aten = torch.ops.aten

LARGE = 512
"""Rows, columns and length of sums from which codes are multiplied; below that float32 is faster (measured)."""


def _values(x: Tensor, qtype: str, scheme: str, per_row: bool) -> Tensor:
    if not x.numel():
        return x.new_empty(x.shape)
    codes, params = dynamic_codes(x, qtype, scheme, per_row)
    shape = (-1, x.shape[-1]) if per_row else (1, -1)
    values = codes.reshape(shape).float().sub_(params[1, :, None]).mul_(params[0, :, None])
    return values.reshape(x.shape).to(x.dtype)


def _product(
    a: Tensor, b: Tensor, qtype: str, scheme: str, per_row: bool, other_qtype: str, other_scheme: str
) -> Tensor:
    plain = a.dtype == b.dtype == torch.float32 and b.ndim == 2 and a.ndim >= 2
    if not plain or min(a.numel() // max(a.shape[-1], 1), *b.shape) < LARGE:
        taken["float product"] += 1
        return torch.matmul(_values(a, qtype, scheme, per_row), _values(b, other_qtype, other_scheme, False))
    taken["int8 product"] += 1
    codes, (scale, zero) = dynamic_codes(a, qtype, scheme, per_row)
    other, (other_scale, other_zero) = dynamic_codes(b, other_qtype, other_scheme, False)
    left, right = ((x ^ 128).view(torch.int8) for x in (codes.view(-1, a.shape[-1]), other))
    zero, other_zero, scale = zero[:, None] - 128, other_zero - 128, scale[:, None] * other_scale
    y = torch._int_mm(left, right).float()
    y -= zero * right.sum(0, dtype=torch.int32).float()
    if other_zero != 0:
        y -= other_zero * (left.sum(1, dtype=torch.int32).float()[:, None] - left.shape[1] * zero)
    return (y * scale).view(*a.shape[:-1], b.shape[1])


define("dynamic_values(Tensor x, str qtype, str scheme, bool per_row) -> Tensor", _values,
       lambda x, *rest: x.new_empty(x.shape))  # fmt: skip
define("dynamic_product(Tensor a, Tensor b, str qtype, str scheme, bool per_row, str other_qtype, str other_scheme)"
       " -> Tensor", _product, lambda a, b, *rest: torch.matmul(a, b))  # fmt: skip


def dynamic_values(*args: Any) -> Any:
    """The real values of `dynamic_codes(x, ...)`, dense, of x's dtype. Call target of the lowered graph."""
    return torch.ops.inc_onednn.dynamic_values(*args)


def dynamic_product(*args: Any) -> Any:
    """`a @ b` of the values of both's codes; b has one scale. Call target of the lowered graph."""
    return torch.ops.inc_onednn.dynamic_product(*args)


# -------------------------------------------------------------------------------------------------------------- claims
def _sides(node: fx.Node) -> list[Chosen] | None:
    found = [chosen(argument(node, i)) for i in (0, 1)]
    return [x for x in found if isinstance(x, Chosen)] if all(isinstance(x, Chosen) for x in found) else None


def _check_product(c: OneDnnContext, found: Match) -> str | None:
    sides = _sides(found.root)
    if sides is None:
        return ""
    if sides[1].per_row:
        return (
            "its second operand has a scale for each row, no factor of the result: float32, on the values of the codes"
        )
    if any(val(x.source).dtype != val(found.root).dtype for x in sides):
        return "its operands have other dtypes than its result"
    return None


def _rewrite_product(c: OneDnnContext, found: Match) -> str:
    node = found.root
    a, b = _sides(node) or ()
    args = (a.source, b.source, a.qtype, a.scheme, a.per_row, b.qtype, b.scheme)
    replace_uses(node, insert_call(c.gm, dynamic_product, args, before=node, like=node))
    return f"int8 from {LARGE} x {LARGE} x {LARGE} on, {a}; smaller or in batches: float32 on the values of the codes"


def _check_values(c: OneDnnContext, found: Match) -> str | None:
    x = chosen(found.root)
    return None if isinstance(x, Chosen) and val(x.source).dtype == val(found.root).dtype else ""


def _rewrite_values(c: OneDnnContext, found: Match) -> None:
    node, x = found.root, chosen(found.root)
    assert isinstance(x, Chosen)
    args = (x.source, x.qtype, x.scheme, x.per_row)
    replace_uses(node, insert_call(c.gm, dynamic_values, args, before=node, like=node))


_PRODUCTS = P((aten.matmul.default, aten.bmm.default, aten.mm.default))
DYNAMIC_PRODUCT = Claim("dynamic product", _PRODUCTS, _rewrite_product, _check_product)
DYNAMIC_VALUES = Claim("dynamic values", P(DEQUANTIZE), _rewrite_values, _check_values, kernel=False)
