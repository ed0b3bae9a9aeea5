"""Convolutions of one to three dimensions and their transposes.

Weights: [out, in / groups, *kernel]; transposed [in, out / groups, *kernel]. A transposed convolution with groups has
no single axis that indexes output channels, so it is quantized only if groups == 1.
"""

import torch
from torch import fx, nn

from inc_graph.oppattern import OpPattern, argument, register_pattern

aten = torch.ops.aten


def _batched(ndim: int):
    def check(node: fx.Node) -> str | None:
        value = node.args[0].meta.get("val")  # type: ignore[union-attr]
        if value is not None and value.ndim != ndim:
            return f"unbatched input of rank {value.ndim}; a batch dimension is needed (rank {ndim})"
        return None

    return check


def _transposed(ndim: int):
    batched = _batched(ndim)

    def check(node: fx.Node) -> str | None:
        if argument(node, 6) != 1:
            return "grouped transposed convolution: its output channels lie on two weight dimensions"
        return batched(node)

    return check


for dims in (1, 2, 3):
    conv = getattr(aten, f"conv{dims}d")
    # `padding` comes as a number, a list or (overload `padding`) the words "same" / "valid"
    register_pattern(
        OpPattern(
            f"conv{dims}d",
            (conv.default, conv.padding),
            weight=1,
            bias=2,
            modules=(getattr(nn, f"Conv{dims}d"), getattr(nn.functional, f"conv{dims}d")),
            check=_batched(dims + 2),
        )
    )
    transposed = getattr(aten, f"conv_transpose{dims}d")
    register_pattern(
        OpPattern(
            f"conv_transpose{dims}d",
            (transposed.default if dims == 1 else transposed.input,),
            weight=1,
            bias=2,
            channel_axis=1,
            modules=(getattr(nn, f"ConvTranspose{dims}d"), getattr(nn.functional, f"conv_transpose{dims}d")),
            check=_transposed(dims + 2),
        )
    )
