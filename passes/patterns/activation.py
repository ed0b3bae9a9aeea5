"""Activation functions: seen as part of the operator that produces their input."""

import torch
import torch.nn.functional as F
from torch import nn

from inc_graph.oppattern import OpPattern, register_pattern

aten = torch.ops.aten

for name, targets, modules in (
    ("relu", (aten.relu.default,), (nn.ReLU, torch.relu, F.relu)),
    (
        "hardtanh",
        (aten.hardtanh.default, aten.relu6.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
        (nn.Hardtanh, nn.ReLU6, F.hardtanh, F.relu6, torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max),
    ),
    ("hardswish", (aten.hardswish.default,), (nn.Hardswish, F.hardswish)),
    ("silu", (aten.silu.default,), (nn.SiLU, F.silu)),
    ("gelu", (aten.gelu.default,), (nn.GELU, F.gelu)),
    ("sigmoid", (aten.sigmoid.default,), (nn.Sigmoid, torch.sigmoid, F.sigmoid)),
    ("hardsigmoid", (aten.hardsigmoid.default,), (nn.Hardsigmoid, F.hardsigmoid)),
    ("tanh", (aten.tanh.default,), (nn.Tanh, torch.tanh, F.tanh)),
    ("leaky_relu", (aten.leaky_relu.default,), (nn.LeakyReLU, F.leaky_relu)),
    ("elu", (aten.elu.default,), (nn.ELU, F.elu)),
    ("mish", (aten.mish.default,), (nn.Mish, F.mish)),
    ("softplus", (aten.softplus.default,), (nn.Softplus, F.softplus)),
    ("selu", (aten.selu.default,), (nn.SELU, F.selu)),
    ("prelu", (aten.prelu.default,), (nn.PReLU, torch.prelu)),
):
    register_pattern(OpPattern(name, targets, role="activation", modules=modules))
