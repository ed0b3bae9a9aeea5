"""Zero padding before a convolution that differs from side to side, taken into the convolution's weight.

    dequantize(q) -> pad with 0 -> quantize -> dequantize -> conv(., w)        conv(dequantize(q), w with zero taps)

all with one scale. Where a convolution knows one padding for both sides, zero taps make up for the difference (see
`_forms`), as long as they are few. Elsewhere the pad costs two conversions and a copy of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from inc_graph.graph import get_tensor, insert_call, insert_get_attr, set_tensor, val
from inc_graph.lowering._context import WEIGHTS, OneDnnContext
from inc_graph.lowering._forms import Sides, can_absorb
from inc_graph.oppattern import argument, set_arguments
from inc_graph.ops import DEQUANTIZE, is_dequantize, is_quantize
from inc_graph.pattern import Match

__all__ = ["CONV", "PadContext", "check_pad", "rewrite_pad"]

aten = torch.ops.aten

CONV = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass
class PadContext(OneDnnContext):
    """`widened`: attribute of a weight with zero taps -> that of the weight, and where in the wide one it is."""

    widened: dict[str, tuple[str, tuple[slice, ...]]] = field(default_factory=dict)


def check_pad(c: PadContext, found: Match) -> str | None:
    """None if the matched convolution can take in the pad before it; "" else: it is computed all the same."""
    return None if _sides(c, found.root) is not None else ""


def _sides(c: OneDnnContext, conv: fx.Node) -> tuple[fx.Node, Sides] | None:
    """The value before the pad, and the padding of pad and convolution together."""
    read, w = argument(conv, 0), argument(conv, 1)
    if not is_dequantize(read) or not is_quantize(read.args[0]) or not is_dequantize(w):
        return None
    pad = read.args[0].args[0]
    source = pad.args[0] if pad.target is aten.pad.default else None
    p = c.qparams(read)
    if p is None or not is_dequantize(source) or {c.qparams(read.args[0]), c.qparams(source)} != {p}:
        return None
    if argument(pad, 2) != "constant" or argument(pad, 3) or w.args[0].op != "get_attr" or w.args[4] not in WEIGHTS:
        return None
    if w.args[2] is not None and bool(get_tensor(c.gm, w.args[2]).any()):
        return None
    dims, own, widths = val(conv).ndim - 2, argument(conv, 4), list(argument(pad, 1))
    if len(widths) > 2 * dims or any(not isinstance(n, int) or n < 0 for n in (*widths, *own)):
        return None
    widths += [0] * (2 * dims - len(widths))
    pairs = list(zip(widths[::2], widths[1::2], strict=True))[::-1]  # `pad` begins with the last dimension
    sides: Sides = tuple((a + n, b + n) for (a, b), n in zip(pairs, _each(own, dims), strict=True))
    return (source, sides) if can_absorb(sides, _each(argument(conv, 5), dims)) else None


def _each(numbers: Any, dims: int) -> tuple[int, ...]:
    return tuple(numbers) * (dims if len(numbers) == 1 else 1)


def rewrite_pad(c: PadContext, found: Match) -> None:
    """Let the matched convolution read what the pad reads."""
    conv, got = found.root, _sides(c, found.root)
    assert got is not None
    source, sides = got
    w: Any = argument(conv, 1)
    padding = [max(side) for side in sides]
    taps = [
        ((s - a) // d, (s - b) // d)
        for s, (a, b), d in zip(padding, sides, _each(argument(conv, 5), len(sides)), strict=True)
    ]
    if any(map(any, taps)):
        codes = torch.nn.functional.pad(get_tensor(c.gm, w.args[0]), [n for t in reversed(taps) for n in t])
        read = insert_get_attr(c.gm, w, set_tensor(c.gm, f"{w.args[0].target}_wide", codes))
        inner = tuple(slice(a, a + k) for (a, _), k in zip(taps, val(w).shape[2:], strict=True))
        c.widened[str(read.target)] = (str(w.args[0].target), (slice(None), slice(None), *inner))
        w = insert_call(c.gm, DEQUANTIZE, (read, *w.args[1:]), before=w, like=w)
    set_arguments(conv, {0: source, 1: w, 4: padding})
