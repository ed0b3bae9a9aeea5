"""Operators that move values run on the codes: dequantize -> max_pool -> quantize, all with one scale, is max_pool.

Exact: a code stands for one value, and the order of codes is the order of their values. Zero in a `pad` becomes the
zero point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inc_graph.graph import insert_call, replace_uses
from inc_graph.lowering._codes import max_pool
from inc_graph.lowering._context import OneDnnContext, QParams
from inc_graph.oppattern import argument, pattern_of
from inc_graph.ops import is_dequantize, is_quantize
from inc_graph.pattern import Match

__all__ = ["MOVES", "check_move", "rewrite_move"]

aten = torch.ops.aten

_ANY = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.detach.default, aten.slice.Tensor, aten.select.int, aten.narrow.default,
    aten.index_select.default, aten.flip.default, aten.roll.default, aten.repeat.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.pad.default, aten.cat.default, aten.stack.default,
    aten.hstack.default, aten.vstack.default, aten.dstack.default, aten.tile.default, aten.repeat_interleave.self_int,
    aten.index.Tensor, aten.gather.default,
)  # fmt: skip
_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
_UNSIGNED = (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
MOVES = (*_ANY, *_POOLS, *_UNSIGNED)
"""Operators whose CPU kernels take uint8; all but the last three int8 as well."""


def check_move(c: OneDnnContext, found: Match) -> str | None:
    """None if the matched operator stands between codes of one scale; "" if it is float."""
    params = _params(c, found.root)
    if isinstance(params, str):
        return params
    if found.root.target in _UNSIGNED and params.dtype != torch.uint8:
        return f"torch's kernel of {found.root.target} does not take {params.dtype}"
    if found.root.target is aten.pad.default and argument(found.root, 2) == "constant" and argument(found.root, 3):
        return "padding with another value than zero"
    return None


def _params(c: OneDnnContext, node: fx.Node) -> QParams | str:
    inputs = _inputs(node)
    if not inputs or not all(is_dequantize(v) for v in inputs) or not all(is_quantize(u) for u in node.users):
        return ""
    numbers = {c.qparams(n) for n in (*inputs, *node.users)}
    p = numbers.pop()
    if numbers or p is None:
        return "its input and its result do not share one static 8-bit scale"
    return p


def _inputs(node: fx.Node) -> list[fx.Node]:
    pattern = pattern_of(node)
    return [] if pattern is None or pattern.role != "carrier" else list(pattern.activations(node))


def rewrite_move(c: OneDnnContext, found: Match) -> None:
    """Let the matched operator read codes and write codes."""
    node = found.root
    p = _params(c, node)
    assert isinstance(p, QParams)
    codes: dict[fx.Node, Any] = {v: v.args[0] for v in _inputs(node)}
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: codes.get(n, n))
    if target is aten.pad.default and argument(node, 2) == "constant":
        args, kwargs = (*args[:2], "constant", p.zero_point), {}
    if target in _POOLS:
        dims = _POOLS.index(target) + 1
        sizes = [list(v) * dims if len(v) == 1 else list(v) for v in (argument(node, i) for i in range(1, 5))]
        target, args, kwargs = max_pool, (args[0], *sizes, argument(node, 5)), {}
    new = insert_call(c.gm, target, args, kwargs, before=node, like=node)
    for user in list(node.users):
        replace_uses(user, new)
