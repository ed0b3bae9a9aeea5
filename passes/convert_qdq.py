"""Replace observers by quantize -> dequantize, and weights by their quantized form: observed -> Q-DQ.

    value --> observer --> reader     becomes     value --> quantize --> dequantize --> reader
    weight ------------> layer        becomes     carrier --> dequantize --> layer

The output of a carrier gets the pair too, with its input's scale (exact: its values are on that grid already), so every
reader sees the same form. One weight tensor that several layers share becomes one carrier.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.calibrate import Observer
from inc_graph.errors import CalibrationError
from inc_graph.graph import (
    erase_dead,
    get_attr,
    get_tensor,
    inc_meta,
    insert_call,
    insert_get_attr,
    peek_meta,
    replace_uses,
    set_level,
    set_tensor,
    storage_key,
)
from inc_graph.numerics import quantize
from inc_graph.ops import DEQUANTIZE, QUANTIZE
from inc_graph.options import make_estimator
from inc_graph.oppattern import pattern_of
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.spec import QSpec


@dataclass
class _State:
    gm: fx.GraphModule
    head: fx.Node
    groups: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]
    params: dict[tuple[str, str, int], tuple[fx.Node, fx.Node | None]] = field(default_factory=dict)
    weights: dict[Any, fx.Node] = field(default_factory=dict)


@PASSES.register("convert-qdq")
@dataclass(frozen=True)
class ConvertQDQ(Pass):
    """observed -> qdq."""

    name: ClassVar[str] = "convert-qdq"
    requires: ClassVar[str] = "observed"
    ensures: ClassVar[str] = "qdq"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        observers = [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(_module(gm, n), Observer)]
        _need_data(gm, observers)
        groups = _solve(gm, observers)
        for node in observers:
            replace_uses(node, node.args[0])
            gm.graph.erase_node(node)
        state = _State(gm, _head(gm), groups)
        for value in list(gm.graph.nodes):
            for key, quant in peek_meta(value).get("quant", {}).items():
                _pair(state, value, key, quant)
                report.matched.append(value.name)
            if "weight" in peek_meta(value):
                _weight(state, value)
        erase_dead(gm)
        set_level(gm, "qdq")
        return PassResult(gm, True, report)


def _head(gm: fx.GraphModule) -> fx.Node:
    """The first node behind the inputs: scales and weights are read before it."""
    last = max((n for n in gm.graph.nodes if n.op == "placeholder"), default=None)
    return next(iter(gm.graph.nodes)) if last is None else last.next


def _module(gm: fx.GraphModule, node: fx.Node) -> Any:
    return get_attr(gm, node.target)  # type: ignore[arg-type]


def _need_data(gm: fx.GraphModule, observers: list[fx.Node]) -> None:
    modules = {n.target: _module(gm, n) for n in observers}
    empty = [m for m in modules.values() if m.elements == 0]
    if empty and len(empty) == len(modules):
        raise CalibrationError(
            "the prepared model has seen no calibration data",
            hint="call it on representative inputs first: for x in data: prepared(x)",
        )
    if empty:
        names = ", ".join(m.node for m in empty[:5]) + (" ..." if len(empty) > 5 else "")
        raise CalibrationError(
            f"{len(empty)} of {len(modules)} observed values saw no data: {names}",
            node=empty[0].node,
            module=empty[0].module_path,
            hint="calibrate with inputs that reach this part of the model",
        )


def _solve(gm: fx.GraphModule, observers: list[fx.Node]) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """(scale, zero point) of each (group, key)."""
    groups: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
    for node in observers:
        value: Any = node.args[0]
        key = peek_meta(node)["observes"]["key"]
        group = (peek_meta(value)["quant"][key]["group"], key)
        if group not in groups:
            groups[group] = _module(gm, node).calculate_qparams()
    return groups


def _params(state: _State, group: tuple[str, str], ndim: int, spec: QSpec) -> tuple[fx.Node, fx.Node | None]:
    """Reads of scale and zero point of a group, for values of rank `ndim` (a view may have changed the rank)."""
    if (*group, ndim) not in state.params:
        scale, zero = state.groups[group]
        if scale.ndim != ndim:
            scale, zero = scale.reshape((1,) * ndim), zero.reshape((1,) * ndim)
        name = group[0] if group[1] == "0" else f"{group[0]}_{group[1]}"
        s = insert_get_attr(state.gm, state.head, set_tensor(state.gm, f"{name}_scale", scale))
        z = None
        if spec.scheme == "asymmetric" or bool((zero != 0).any()):  # symmetric and unsigned: zero is the middle
            z = insert_get_attr(state.gm, state.head, set_tensor(state.gm, f"{name}_zero_point", zero))
        state.params[(*group, ndim)] = (s, z)
    return state.params[(*group, ndim)]


def _pair(state: _State, value: fx.Node, key: str, quant: dict[str, Any]) -> None:
    spec = QSpec.from_json(quant["spec"])
    fake: torch.Tensor = value.meta["val"]
    scale, zero = _params(state, (quant["group"], key), fake.ndim, spec)
    block = list(spec.block(fake.ndim))
    readers = [u for u in value.users if peek_meta(u).get("reads", {}).get(value.name) == key]
    where = {"before": state.head} if value < state.head else {"after": value}
    q = insert_call(state.gm, QUANTIZE, (value, scale, zero, block, spec.qtype), like=value, **where)
    dq = insert_call(state.gm, DEQUANTIZE, (q, scale, zero, block, spec.qtype, fake.dtype), after=q, like=value)
    replace_uses(value, dq, only=readers)


def _weight(state: _State, layer: fx.Node) -> None:
    gm = state.gm
    pattern = pattern_of(layer)
    assert pattern is not None and pattern.weight is not None
    read: Any = layer.args[pattern.weight]
    info = peek_meta(layer)["weight"]
    spec = QSpec.from_json(info["spec"])
    tensor = get_tensor(gm, read)
    identity = (storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), str(spec), info["algorithm"])
    if identity not in state.weights:
        w = tensor.detach()
        scale, zero = make_estimator(info["algorithm"]).estimate(w, spec)
        block = list(spec.block(w.ndim))
        asymmetric = spec.scheme == "asymmetric" or bool((zero != 0).any())
        carrier = quantize(w, scale, zero if asymmetric else None, block, spec.qtype)
        hint = read.target.replace(".", "_")
        q = insert_get_attr(gm, state.head, set_tensor(gm, f"{hint}_q", carrier))
        s = insert_get_attr(gm, state.head, set_tensor(gm, f"{hint}_scale", scale))
        z = insert_get_attr(gm, state.head, set_tensor(gm, f"{hint}_zero_point", zero)) if asymmetric else None
        args = (q, s, z, block, spec.qtype, tensor.dtype)
        state.weights[identity] = insert_call(gm, DEQUANTIZE, args, before=state.head, like=layer)
    args = list(layer.args)
    args[pattern.weight] = state.weights[identity]
    layer.args = tuple(args)
    inc_meta(layer)["weight"].pop("mean", None)
