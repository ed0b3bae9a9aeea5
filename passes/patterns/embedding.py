"""Table lookups: only the table is quantized, one scale a row; the indices are integers."""

import torch
from torch import nn

from inc_graph.oppattern import OpPattern, register_pattern

aten = torch.ops.aten

register_pattern(
    OpPattern(
        "embedding",
        (aten.embedding.default,),
        inputs=(),
        weight=0,
        modules=(nn.Embedding, nn.functional.embedding, torch.embedding),
    )
)
