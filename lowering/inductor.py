"""CPU backend: Q-DQ to int8 layers of oneDNN and to weight-only layers, fast called directly and under torch.compile.

    dequantize(x) , dequantize(w) -> linear | conv  [-> + other] [-> activation] [-> quantize]    becomes one Int8Layer
    dequantize(x) -> view | max_pool | cat | pad -> quantize (same scale)                          runs on the codes
    choose_qparams(x) -> quantize -> dequantize , dequantize(w) -> linear          becomes one DynamicLayer
    conv | linear in half precision [-> + other] [-> activation]                      becomes one HalfLayer
    dequantize(table) -> embedding                                                                 looks up codes
    x (float) , dequantize(w) -> linear                                      becomes one weight_only_linear (any format)
    scaled_dot_product_attention (float32)                                                 one compiled pass, in float32

What is left of quantize and dequantize becomes one fast pass over the data (eager) or is fused by inductor (compiled).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx, nn

from inc_graph.graph import insert_call, is_float, replace_uses, val
from inc_graph.lowering._attention import ATTENTION
from inc_graph.lowering._codes import dequantize_codes, lookup_rows, quantize_codes
from inc_graph.lowering._context import CODES, OneDnnContext
from inc_graph.lowering._dynamic_claims import DYNAMIC_LINEAR
from inc_graph.lowering._dynamic_joined import join_layers
from inc_graph.lowering._dynamic_product import DYNAMIC_PRODUCT, DYNAMIC_VALUES
from inc_graph.lowering._fusion import CONV, LINEAR, TRANSPOSED
from inc_graph.lowering._half_claims import HALF_LAYERS
from inc_graph.lowering._layers import check_layer, check_signed, rewrite_layer, rewrite_signed
from inc_graph.lowering._layouts import settle_layouts
from inc_graph.lowering._moves import MOVES, check_move, rewrite_move
from inc_graph.lowering._recurrent import GRU, LSTM, PROJECT
from inc_graph.lowering._regions import for_compile
from inc_graph.lowering._weight_only_claims import LOOKUP, WEIGHT_ONLY, WEIGHT_VALUES
from inc_graph.lowering._x86 import X86Backend, capabilities
from inc_graph.lowering.base import Claim
from inc_graph.oppattern import argument
from inc_graph.ops import DEQUANTIZE, QUANTIZE, is_dequantize
from inc_graph.pattern import Match, P
from inc_graph.registry import BACKENDS

aten = torch.ops.aten

_CONVOLUTIONS = tuple(f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3))


# ----------------------------------------------------------------------------------------------------------- lookups
def _check_lookup(c: OneDnnContext, found: Match) -> str | None:
    table: Any = argument(found.root, 0)
    if not is_dequantize(table):
        return ""
    codes, _, _, block, qtype = table.args[:5]
    if qtype not in CODES or list(block) != [1, -1]:
        return f"a table of {qtype} in blocks {list(block)}; the kernel takes 8-bit rows"
    if codes.op != "get_attr":
        return "its table is not a constant"
    return None


def _rewrite_lookup(c: OneDnnContext, found: Match) -> None:
    node = found.root
    table: Any = argument(node, 0)
    args = (*table.args[:3], argument(node, 1), val(node).dtype)
    replace_uses(node, insert_call(c.gm, lookup_rows, args, before=node, like=node))


# ------------------------------------------------------------------------------------------------------- conversions
def _check_quantize(c: OneDnnContext, found: Match) -> str | None:
    p = c.qparams(found.root)
    source: Any = found.root.args[0]
    return None if p is not None and p.full and is_float(source) else ""


def _rewrite_quantize(c: OneDnnContext, found: Match) -> None:
    node, p = found.root, c.qparams(found.root)
    assert p is not None
    args = (node.args[0], p.scale, p.zero_point, p.dtype)
    replace_uses(node, insert_call(c.gm, quantize_codes, args, before=node, like=node))


def _check_dequantize(c: OneDnnContext, found: Match) -> str | None:
    source: Any = found.root.args[0]
    return "" if c.qparams(found.root) is None or source.op == "get_attr" else None


def _rewrite_dequantize(c: OneDnnContext, found: Match) -> None:
    node, p = found.root, c.qparams(found.root)
    assert p is not None
    args = (node.args[0], p.scale, p.zero_point, argument(node, 5))
    replace_uses(node, insert_call(c.gm, dequantize_codes, args, before=node, like=node))


class Inductor(X86Backend):
    """oneDNN int8 on x86 CPUs; under torch.compile inductor fuses what is between the layers."""

    name = "inductor"
    capabilities: ClassVar = capabilities(_CONVOLUTIONS, weight_only=("lstm_steps", "gru_steps", "projection"))

    def lacks(self) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"

    def start(self, gm: fx.GraphModule) -> OneDnnContext:
        return OneDnnContext(gm, compute_dtype=self.compute_dtype)

    def claims(self) -> tuple[Claim, ...]:
        return (
            Claim("int8 as uint8", P(QUANTIZE), rewrite_signed, check_signed, kernel=False),
            Claim("move", P(MOVES), rewrite_move, check_move, kernel=False),
            Claim("int8 convolution", P(CONV), rewrite_layer, check_layer),
            DYNAMIC_LINEAR,
            Claim("int8 linear", P(LINEAR), rewrite_layer, check_layer),
            Claim("int8 transposed convolution", P(TRANSPOSED), rewrite_layer, check_layer),
            Claim("int8 lookup", P(aten.embedding.default), _rewrite_lookup, _check_lookup),
            HALF_LAYERS,
            WEIGHT_ONLY,
            PROJECT,
            LSTM,
            GRU,
            LOOKUP,
            ATTENTION,
            WEIGHT_VALUES,
            DYNAMIC_PRODUCT,
            DYNAMIC_VALUES,
            Claim("quantize", P(QUANTIZE), _rewrite_quantize, _check_quantize, kernel=False),
            Claim("dequantize", P(DEQUANTIZE), _rewrite_dequantize, _check_dequantize, kernel=False),
        )

    def finish(self, context: OneDnnContext) -> None:
        join_layers(context)
        settle_layouts(context)

    def for_compile(self, lowered: fx.GraphModule) -> nn.Module:
        return for_compile(lowered)


BACKENDS.add("inductor", Inductor())
