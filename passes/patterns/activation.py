"""Activation functions: seen as part of the operator that produces their input."""

import torch
from torch import nn

from inc_graph.oppattern import OpPattern, register_pattern

aten = torch.ops.aten

for name, targets, modules in (
    ("relu", (aten.relu.default,), (nn.ReLU, torch.relu)),
    (
        "hardtanh",
        (aten.hardtanh.default, aten.relu6.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
        (nn.Hardtanh, nn.ReLU6, torch.clamp),
    ),
    ("hardswish", (aten.hardswish.default,), (nn.Hardswish,)),
    ("silu", (aten.silu.default,), (nn.SiLU,)),
    ("gelu", (aten.gelu.default,), (nn.GELU,)),
    ("sigmoid", (aten.sigmoid.default,), (nn.Sigmoid, torch.sigmoid)),
    ("hardsigmoid", (aten.hardsigmoid.default,), (nn.Hardsigmoid,)),
    ("tanh", (aten.tanh.default,), (nn.Tanh, torch.tanh)),
    ("leaky_relu", (aten.leaky_relu.default,), (nn.LeakyReLU,)),
    ("elu", (aten.elu.default,), (nn.ELU,)),
    ("mish", (aten.mish.default,), (nn.Mish,)),
    ("softplus", (aten.softplus.default,), (nn.Softplus,)),
    ("selu", (aten.selu.default,), (nn.SELU,)),
    ("prelu", (aten.prelu.default,), (nn.PReLU,)),
):
    register_pattern(OpPattern(name, targets, role="activation", modules=modules))
