"""Products of two activations. (A product with a constant matrix is a linear layer: see the pass `canonicalize`.)"""

import operator

import torch

from inc_graph.oppattern import OpPattern, register_pattern

aten = torch.ops.aten

register_pattern(
    OpPattern(
        "matmul",
        (aten.matmul.default, aten.mm.default, aten.bmm.default),
        inputs=(0, 1),
        modules=(torch.matmul, torch.mm, torch.bmm, torch.linalg.matmul, operator.matmul),
    )
)
register_pattern(OpPattern("addmm", (aten.addmm.default,), inputs=(1, 2), modules=(torch.addmm,)))
register_pattern(OpPattern("baddbmm", (aten.baddbmm.default,), inputs=(1, 2), modules=(torch.baddbmm,)))
register_pattern(
    OpPattern(
        "sdpa",
        (aten.scaled_dot_product_attention.default,),
        role="opaque",
        modules=(torch.nn.functional.scaled_dot_product_attention,),
        reason="attention is computed whole in float: its softmax has no int8 kernel",
    )
)
