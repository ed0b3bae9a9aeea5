"""Activation functions: seen as part of the operator that produces their input."""

import torch
from torch import nn

from inc_graph.oppattern import OpPattern, register_pattern

aten = torch.ops.aten

for name, targets, modules in (
    ("relu", (aten.relu.default,), (nn.ReLU,)),
    ("hardtanh", (aten.hardtanh.default, aten.relu6.default, aten.clamp.default), (nn.Hardtanh, nn.ReLU6)),
    ("hardswish", (aten.hardswish.default,), (nn.Hardswish,)),
    ("silu", (aten.silu.default,), (nn.SiLU,)),
    ("gelu", (aten.gelu.default,), (nn.GELU,)),
    ("sigmoid", (aten.sigmoid.default,), (nn.Sigmoid,)),
    ("hardsigmoid", (aten.hardsigmoid.default,), (nn.Hardsigmoid,)),
    ("tanh", (aten.tanh.default,), (nn.Tanh,)),
    ("leaky_relu", (aten.leaky_relu.default,), (nn.LeakyReLU,)),
    ("elu", (aten.elu.default,), (nn.ELU,)),
):
    register_pattern(OpPattern(name, targets, role="activation", modules=modules))
