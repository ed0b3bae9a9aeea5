"""Operators that move values without changing them: their output keeps the scale of their input."""

import torch
import torch.nn.functional as F
from torch import fx

from inc_graph.oppattern import OpPattern, argument, register_pattern

aten = torch.ops.aten


def _pad(node: fx.Node) -> str | None:
    mode, value = argument(node, 2), argument(node, 3)
    if mode == "constant" and value not in (None, 0, 0.0):
        return f"padding with {value}: only zero is exact at every scale"
    return None


_RESHAPE = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)
_SELECT = (
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.index_select.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.tile.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
)

_NAMED_SELECT = (
    torch.nn.PixelShuffle, torch.nn.PixelUnshuffle, torch.nn.ChannelShuffle, F.pixel_shuffle, F.pixel_unshuffle,
    F.channel_shuffle, torch.select, torch.narrow, torch.index_select, torch.flip, torch.roll, torch.tile,
    torch.repeat_interleave, torch.gather,
)  # fmt: skip
_NAMED_POOL = (
    torch.nn.MaxPool1d, torch.nn.MaxPool2d, torch.nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
)  # fmt: skip
_NAMED_RESHAPE = (
    torch.nn.Flatten, torch.nn.Unflatten, torch.reshape, torch.flatten, torch.unflatten, torch.permute,
    torch.transpose, torch.swapaxes, torch.t, torch.movedim, torch.squeeze, torch.unsqueeze, torch.clone,
)  # fmt: skip
register_pattern(
    OpPattern(
        "reshape",
        _RESHAPE,
        role="carrier",
        modules=_NAMED_RESHAPE,
    )
)
register_pattern(
    OpPattern(
        "select",
        _SELECT,
        role="carrier",
        modules=_NAMED_SELECT,
    )
)
register_pattern(
    OpPattern(
        "pad",
        (aten.pad.default,),
        role="carrier",
        modules=(torch.nn.ZeroPad1d, torch.nn.ZeroPad2d, torch.nn.ZeroPad3d, F.pad),
        check=_pad,
    )
)
register_pattern(
    OpPattern(
        "cat",
        (aten.cat.default, aten.stack.default, aten.hstack.default, aten.vstack.default, aten.dstack.default),
        role="carrier",
        modules=(torch.cat, torch.concat, torch.stack, torch.hstack, torch.vstack, torch.dstack),
    )
)
register_pattern(
    OpPattern(
        "max_pool",
        (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
        role="carrier",
        modules=_NAMED_POOL,
    )
)
register_pattern(
    OpPattern(
        "upsample_nearest",
        (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
        role="carrier",
        modules=(torch.nn.Upsample, torch.nn.UpsamplingNearest2d, F.interpolate, F.upsample),
    )
)
