"""Recurrent layers: known, and left float with the reason, unless the pass `split-recurrent` takes them apart."""

import torch
from torch import nn

from inc_graph.oppattern import OpPattern, register_pattern

aten = torch.ops.aten

for name, targets, *modules in (
    ("lstm", (aten.lstm.input, aten.lstm.data), nn.LSTM, torch.lstm),
    ("gru", (aten.gru.input, aten.gru.data), nn.GRU, torch.gru),
    (
        "rnn",
        (aten.rnn_tanh.input, aten.rnn_relu.input, aten.rnn_tanh.data, aten.rnn_relu.data),
        nn.RNN,
        torch.rnn_tanh,
        torch.rnn_relu,
    ),
):
    register_pattern(
        OpPattern(
            name,
            targets,
            role="opaque",
            modules=tuple(modules),
            reason="a recurrent state is fed back through every step; static ranges do not fit it and no backend has a "
            "kernel (dynamic quantization takes an LSTM or GRU apart)",
        )
    )
