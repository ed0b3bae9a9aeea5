"""Views of values whose memory layout is not the same in each call.

Which kernel computes attention depends on grad mode, on whether an input requires grad and on what the user allows
(`torch.nn.attention.sdpa_kernel`), and the kernels do not write the same strides. The exporter sees one of them, drops
each `contiguous` that does nothing there, and turns `reshape` into `view`. Below such a value a view is therefore a
`reshape`, which copies where a view is not possible, and what the caller gets is as contiguous as it was.
"""

from __future__ import annotations

import torch
from torch import fx

from inc_graph.graph import insert_call, is_contiguous, val

__all__ = ["settle_views"]

aten = torch.ops.aten

_SOURCES = ("scaled_dot_product", "flex_attention")  # parts of operator names
_SETTLED = (aten.linear.default, aten.layer_norm.default, aten.embedding.default)  # always written row by row
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def settle_views(gm: fx.GraphModule, inputs: bool = False) -> None:
    """Turn the views that depend on a layout that may change into `reshape`, in control-flow bodies as well.

    Outputs that were contiguous when the model was captured are so in each call.
    `inputs`: whether those of this graph have no fixed layout either (a body, which may get what attention computes).
    """
    unsettled = _unsettled(gm.graph, inputs)
    for node in unsettled:
        if node.target in _VIEWS:
            node.target = aten.reshape.default
    for output in gm.graph.find_nodes(op="output"):
        for value in output.all_input_nodes:
            # what attention itself gives back has the layout of the kernel in the model, too
            if value in unsettled and not _is_source(value) and is_contiguous(val(value)):
                new = insert_call(gm, aten.contiguous.default, (value,), before=output, like=value)
                output.replace_input_with(value, new)
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            settle_views(child, inputs or bool(unsettled))
            child.recompile()


def _is_source(node: fx.Node) -> bool:
    return any(s in str(node.target) for s in _SOURCES)


def _unsettled(graph: fx.Graph, inputs: bool) -> dict[fx.Node, None]:
    """Values whose layout may not be the one in their fake value, in graph order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and inputs:
            found[node] = None
        if node.op != "call_function" or node.target in _SETTLED:
            continue
        if _is_source(node) or any(i in found for i in node.all_input_nodes):
            found[node] = None
    return found
