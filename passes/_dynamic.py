"""Scales found as the model runs: what stands in front of readers that quantize what they read, each time anew.

    value --> choose_qparams --> quantize --> dequantize --> reader

One for all readers of a value in one format. Nothing is observed, and nothing travels through views: a scale for each
row of what a reader sees is none of what was reshaped into it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from inc_graph.graph import insert_call, peek_meta, replace_uses
from inc_graph.ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from inc_graph.passes._place import Maker
from inc_graph.spec import QSpec

__all__ = ["is_dynamic", "quantize_at_run_time"]


def is_dynamic(quant: Mapping[str, Any]) -> bool:
    """Whether an annotated format has its scales computed at run time."""
    return bool(quant["spec"]["dynamic"])


def quantize_at_run_time(make: Maker, value: fx.Node, key: str, spec: QSpec) -> None:
    """Let the readers that want `value` under `key` read it quantized with its own range.

    A symmetric signed format has no zero point, which would be 0 in every place.
    """
    fake: Tensor = value.meta["val"]
    block = list(spec.block(fake.ndim))
    readers = [u for u in value.users if peek_meta(u).get("reads", {}).get(value.name) == key]
    with_zero = spec.scheme == "asymmetric" or not spec.type.signed
    if value < make.first:  # an input or a parameter: behind the last of the inputs
        chosen = insert_call(make.gm, CHOOSE_QPARAMS, (value, block, spec.qtype, spec.scheme), before=make.first)
    else:
        chosen = insert_call(make.gm, CHOOSE_QPARAMS, (value, block, spec.qtype, spec.scheme), after=value)
    last = scale = insert_call(make.gm, operator.getitem, (chosen, 0), after=chosen, like=value)
    zero = None
    if with_zero:
        last = zero = insert_call(make.gm, operator.getitem, (chosen, 1), after=scale, like=value)
    how = (scale, zero, block, spec.qtype)
    q = insert_call(make.gm, QUANTIZE, (value, *how), after=last, like=value)
    dq = insert_call(make.gm, DEQUANTIZE, (q, *how, fake.dtype), after=q, like=value)
    replace_uses(value, dq, only=readers)
