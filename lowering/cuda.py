"""CUDA backend: layers with quantized weights and float inputs on a GPU.

    x (float) , dequantize(w) -> linear     becomes one cuda_linear: torch's packed int4 kernel, or values made for it
    dequantize(table) -> embedding          looks up the rows that are asked for
    dequantize(w) -> anything else          is dequantized at each call

What it has no kernel for, int8 layers with quantized inputs above all, runs on the reference, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from inc_graph.graph import get_tensor, insert_call, insert_get_attr, replace_uses, set_tensor, val
from inc_graph.lowering._cuda_layout import GROUPS, inner_tiles, pairs_of, stored_bytes, tiled
from inc_graph.lowering._cuda_linear import FEW, cuda_linear
from inc_graph.lowering._weight_only_claims import (
    FORMATS,
    LOOKUP,
    WEIGHT_ONLY,
    WEIGHT_VALUES,
    Stored,
    check_linear,
    compute_dtype_of,
    stored,
)
from inc_graph.lowering.base import Backend, Claim, Context
from inc_graph.oppattern import argument
from inc_graph.pattern import Match
from inc_graph.registry import BACKENDS

__all__ = ["Cuda"]


@dataclass
class _Context(Context):
    """`layouts`: attributes of a weight -> those of its tensor core layout, which all readers of the weight share."""

    compute_dtype: torch.dtype | None = None
    device: str = ""
    layouts: dict[tuple[str, ...], tuple[str, str]] = field(default_factory=dict)


def has_bf16(device: torch.device) -> bool:
    """Whether the GPU multiplies bfloat16, which is what torch's packed kernel does."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _why_values(w: Stored, kind: torch.dtype, fast: bool) -> str | None:
    """Why the packed kernel cannot take a weight, None if it can."""
    rows, cols = w.shape
    group = cols if w.block[1] < 0 else w.block[1]
    if w.qtype not in ("int4", "uint4"):
        return f"{w.qtype} codes"
    if kind != torch.bfloat16:
        return f"in {str(kind).removeprefix('torch.')}"
    if not fast:
        return "a GPU without bfloat16 tensor cores"
    if w.block[0] != 1 or group not in GROUPS or cols % group:
        return f"groups of {group}" if w.block[0] == 1 else f"blocks {list(w.block)}"
    if rows % 8 or inner_tiles(cols) is None:
        return f"{rows} x {cols} entries"
    if w.scale.op != "get_attr" or (w.zero_point is not None and w.zero_point.op != "get_attr"):
        return "scales that are quantized too"
    return None


def _rewrite_linear(c: _Context, found: Match) -> str:
    node = found.root
    x, w = argument(node, 0), stored(argument(node, 1), c.device)
    assert isinstance(w, Stored)
    fast = has_bf16(val(w.codes).device)
    kind = compute_dtype_of(c, node, torch.bfloat16 if fast else val(x).dtype)
    why = _why_values(w, kind, fast)
    codes, pairs = (w.codes, None) if why is not None else _in_layout(c, w, node)
    args = (x, codes, w.scale, w.zero_point, pairs, argument(node, 2), list(w.block), w.qtype, kind)
    replace_uses(node, insert_call(c.gm, cuda_linear, args, before=node, like=node))
    way = f"packed up to {FEW} rows" if why is None else f"dequantized at each call: {why}"
    return f"weight-only {w.qtype} linear, {str(kind).removeprefix('torch.')} ({way})"


def _in_layout(c: _Context, w: Stored, layer: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Reads of the weight in the tensor core layout, and of its scales and zeros; from now on the only copy of it."""
    attr = str(w.codes.target)
    key = (attr, *(str(n.target) for n in (w.scale, w.zero_point) if n is not None))
    if key not in c.layouts:
        signed = w.qtype == "int4"
        weight = tiled(get_tensor(c.gm, w.codes), signed)
        zero = None if w.zero_point is None else get_tensor(c.gm, w.zero_point)
        pairs = pairs_of(get_tensor(c.gm, w.scale), zero, signed)
        c.layouts[key] = set_tensor(c.gm, f"{attr}_tiled", weight), set_tensor(c.gm, f"{attr}_pairs", pairs)
        c.packed[attr] = partial(stored_bytes, weight, signed)
    first, second = c.layouts[key]
    return insert_get_attr(c.gm, layer, first), insert_get_attr(c.gm, layer, second)


class Cuda(Backend):
    """Weight-only layers on an NVIDIA GPU."""

    name = "cuda"
    device = "cuda"
    """Kind of device that the weights have to be on."""
    capabilities: ClassVar = {op: tuple((None, w) for w in FORMATS) for op in ("linear", "embedding")}
    compute_dtype: torch.dtype | None = None
    """What weight-only layers are computed in; None: `INC_COMPUTE_DTYPE`, else bfloat16 where the GPU has it."""

    def available(self) -> str | None:
        return None if torch.cuda.is_available() else "torch has no CUDA device here"

    def supported(self) -> tuple[str, ...] | None:
        """Everything: who asks for int8 activations gets the graph, on the reference, until there are kernels."""
        return None

    def start(self, gm: fx.GraphModule) -> _Context:
        return _Context(gm, compute_dtype=self.compute_dtype, device=self.device)

    def claims(self) -> tuple[Claim, ...]:
        linear = Claim(WEIGHT_ONLY.name, WEIGHT_ONLY.pattern, _rewrite_linear, check_linear)
        return linear, LOOKUP, WEIGHT_VALUES


BACKENDS.add("cuda", Cuda())
