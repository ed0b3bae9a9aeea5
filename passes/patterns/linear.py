"""Linear layers: `y = x W^T + b`, weight [out, in]."""

import torch
from torch import nn

from inc_graph.oppattern import OpPattern, register_pattern

aten = torch.ops.aten

register_pattern(
    OpPattern(
        "linear", (aten.linear.default,), weight=1, bias=2, modules=(nn.Linear, nn.functional.linear, nn.LazyLinear)
    )
)
