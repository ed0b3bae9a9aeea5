"""LSTM and GRU layer by layer: their graph takes packed sequences, and this brings what the layer is called with there.

A tensor of sequences of one length is a packed one, all of whose steps have all rows. So one graph, of
(data [R, in], batch_sizes [T], first states [layers * directions, N, *]), serves every call that torch's layers take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from inc_graph.errors import CaptureError

__all__ = ["RECURRENT", "OnRows", "call_recurrent", "example_of", "unfit_recurrent"]

RECURRENT = (nn.LSTM, nn.GRU)
_HINT = "call the model with inputs like those of the float model"


class OnRows(nn.Module):
    """The layer as a module that its graph is captured from; the parameters are the layer's own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, parameter)
        self._layer = (layer,)  # no submodule

    def forward(self, data: Tensor, batch_sizes: Tensor, *states: Tensor) -> Any:
        layer = self._layer[0]
        weights: list[Tensor] = [self.get_parameter(n) for names in layer._all_weights for n in names]
        rest = (layer.bias, layer.num_layers, 0.0, False, layer.bidirectional)
        if layer.mode == "LSTM":
            return torch._VF.lstm(data, batch_sizes, states, weights, *rest)
        return torch._VF.gru(data, batch_sizes, states[0], weights, *rest)

    def extra_repr(self) -> str:
        return repr(self._layer[0])


def example_of(layer: Any) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """(example inputs, their dynamic dimensions) of the graph of a layer."""
    weight, dynamic = layer.weight_ih_l0, torch.export.Dim.DYNAMIC
    data = torch.zeros(7, layer.input_size, dtype=weight.dtype, device=weight.device)
    states = tuple(data.new_zeros(layers, 3, size) for layers, size in _states(layer))
    sizes = torch.tensor([3, 2, 1, 1])
    return (data, sizes, *states), ({0: dynamic}, {0: dynamic}, *({1: dynamic} for _ in states))


def unfit_recurrent(layer: Any) -> str | None:
    """Why a layer cannot be replaced by its graph, None if it can."""
    kind = next(c for c in RECURRENT if isinstance(layer, c))
    if type(layer).forward is not kind.forward or "forward" in vars(layer):
        return f"its class {type(layer).__name__} has a forward of its own"
    names = [n for names in layer._all_weights for n in names]
    if set(layer._parameters) != set(names):
        return "its weights are computed from other parameters at each call"
    weights = [layer._parameters[n] for n in names]
    if len({(w.dtype, w.device) for w in weights}) > 1 or not weights[0].is_floating_point():
        return "its weights are not of one floating point dtype on one device"
    if any(w.layout != torch.strided or not w.numel() for w in weights):
        return "one of its weights is empty or not dense"
    return None


def _states(layer: Any) -> list[tuple[int, int]]:
    """(layers, size) of each state."""
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    size = layer.hidden_size
    return [(layers, layer.proj_size or size), (layers, size)] if layer.mode == "LSTM" else [(layers, size)]


def call_recurrent(layer: Any, graph: Any, dtype: torch.dtype, x: Any, hx: Any = None) -> Any:
    """What the layer would return for `layer(x, hx)`, computed by `graph`.

    Raises:
        CaptureError: inputs of other sizes or dtypes than the layer takes.
    """
    packed, order, back, single, first = isinstance(x, PackedSequence), None, None, False, False
    if packed:
        data, sizes, order, back = x
        _check(layer, "input", data, (-1, layer.input_size), dtype)
        n = int(sizes[0])
    else:
        single, first = getattr(x, "ndim", 0) == 2, layer.batch_first and getattr(x, "ndim", 0) == 3
        _check(layer, "input", x, ((-1,) if single else (-1, -1)) + (layer.input_size,), dtype)
        steps = x[:, None] if single else x.transpose(0, 1) if first else x
        n, data = steps.shape[1], steps.reshape(-1, layer.input_size)
        sizes = torch.full((steps.shape[0],), n, dtype=torch.int64)
        if not n and steps.shape[0]:
            return _nothing(layer, x)
        if not steps.shape[0]:
            _fault(layer, f"its input has shape {list(x.shape)}: there is no step")
    out, *last = graph(data, sizes, *_first(layer, hx, data, n, single, order))
    if packed:
        out = PackedSequence(out, sizes, order, back)
        last = last if back is None else [s.index_select(1, back) for s in last]
    else:
        out = out.view(-1, n, out.shape[-1])
        out = out[:, 0] if single else out.transpose(0, 1) if first else out
        last = [s[:, 0] for s in last] if single else last
    return out, tuple(last) if layer.mode == "LSTM" else last[0]


def _nothing(layer: Any, x: Tensor) -> tuple[Tensor, Any]:
    """What it gives where there are steps and no sequences."""
    wide = (2 if layer.bidirectional else 1) * (layer.proj_size or layer.hidden_size)
    last = tuple(x.new_zeros(layers, 0, size) for layers, size in _states(layer))
    return x.new_zeros(*x.shape[:-1], wide), last if layer.mode == "LSTM" else last[0]


def _first(layer: Any, hx: Any, data: Tensor, n: int, single: bool, order: Tensor | None) -> list[Tensor]:
    wanted = _states(layer)
    if hx is None:
        return [data.new_zeros(layers, n, size) for layers, size in wanted]
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    if len(states) != len(wanted):
        _fault(layer, f"it takes {len(wanted)} first states, not {len(states)}")
    for name, state, (layers, size) in zip(("first h", "first c"), states, wanted, strict=False):
        _check(layer, name, state, (layers, size) if single else (layers, n, size), data.dtype)
    states = [s[:, None] for s in states] if single else states
    return states if order is None else [s.index_select(1, order) for s in states]


def _check(layer: Any, name: str, x: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(x, Tensor):
        _fault(layer, f"its {name} is {type(x).__name__}, not a tensor")
    if len(x.shape) != len(shape) or any(w not in (-1, h) for w, h in zip(shape, x.shape, strict=True)):
        want = ", ".join("*" if w < 0 else str(w) for w in shape)
        _fault(layer, f"its {name} has shape {list(x.shape)}, it takes [{want}]")
    if x.dtype != dtype:
        _fault(layer, f"its {name} is {x.dtype}, it takes {dtype}")


def _fault(layer: Any, text: str) -> None:
    raise CaptureError(text, module=layer.path, hint=_HINT)
