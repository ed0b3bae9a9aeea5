"""LSTM, GRU and RNN of any number of steps, captured whole.

torch's exporter runs such a layer step by step to learn the shape of its result, which ties the graph to the number of
steps of the example. While a model is captured, calls go to operators of ours instead that know the shape; in the graph
they become the aten operators that they stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

__all__ = ["WholeRecurrent", "name_recurrent"]

aten = torch.ops.aten
_library = torch.library.Library("inc_whole", "FRAGMENT")  # names of nodes come from those of operators
_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_AS_ATEN: dict[Any, Any] = {}
_WHOLE: dict[tuple[str, str], Any] = {}  # (kind, overload) -> operator of ours


def _results(x: Tensor, states: list[Tensor], both: bool, *shape: Any) -> tuple[Tensor, ...]:
    return (x.new_empty(*shape, states[0].shape[2] * (1 + both)), *(torch.empty_like(s) for s in states))


def _states(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


def _input(
    x: Tensor, hx: Any, params: Any, biases: bool, layers: int, dropout: float, train: bool, both: bool, first: bool
) -> tuple[Tensor, ...]:
    steps, batch = (x.shape[1], x.shape[0]) if first else (x.shape[0], x.shape[1])
    out, *last = _results(x, _states(hx), both, steps, batch)
    return out.transpose(0, 1) if first else out, *last


def _data(
    x: Tensor, sizes: Tensor, hx: Any, params: Any, biases: bool, layers: int, dropout: float, train: bool, both: bool
) -> tuple[Tensor, ...]:
    return _results(x, _states(hx), both, x.shape[0])


for _kind in _KINDS:
    for _overload, _fake in (("input", _input), ("data", _data)):
        _target = getattr(getattr(aten, _kind), _overload)
        _name = f"{_kind}.{_overload}"
        _library.define(str(_target._schema).replace("aten::", ""))
        _library.impl(_name, _target, "CompositeExplicitAutograd")
        torch.library.register_fake(f"inc_whole::{_name}", _fake, lib=_library)
        _WHOLE[_kind, _overload] = _own = getattr(getattr(torch.ops.inc_whole, _kind), _overload)
        _AS_ATEN[_own] = _target

_FUNCTIONS = {getattr(torch._VF, kind): kind for kind in _KINDS}


class WholeRecurrent(TorchFunctionMode):
    """While it is on, calls of these layers on the CPU or elsewhere, outside of autocast, are one operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _FUNCTIONS.get(func)
        if kind is None or kwargs or torch.is_autocast_enabled(args[0].device.type):  # which casts what it knows
            return func(*args, **(kwargs or {}))
        packed = isinstance(args[1] if kind == "lstm" else args[2], Tensor)
        return _WHOLE[kind, "data" if packed else "input"](*args)


def name_recurrent(gm: fx.GraphModule) -> None:
    """Let the nodes call the operators of aten."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _AS_ATEN:
            node.target = _AS_ATEN[node.target]
