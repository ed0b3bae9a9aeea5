"""Replace observers by quantize -> dequantize, and constants by their quantized form: observed -> Q-DQ.

    value --> observer --> reader     becomes     value --> quantize --> dequantize --> reader
    weight ------------> layer        becomes     carrier --> dequantize --> layer
                                      below 8 bits  bytes --> unpack --> dequantize --> layer

The output of a carrier gets the pair too, with its input's scale (exact: its values are on that grid already), so every
reader sees the same form. One weight tensor that several layers share becomes one carrier. Where scales are found at
run time there is no observer: see `_dynamic`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.calibrate import Observer
from inc_graph.errors import CalibrationError, IncError
from inc_graph.gram import GramObserver
from inc_graph.graph import (
    erase_dead,
    get_attr,
    get_tensor,
    inc_meta,
    module_path,
    peek_meta,
    replace_uses,
    set_level,
    view_key,
)
from inc_graph.in_sequence import IN_SEQUENCE, InSequence
from inc_graph.oppattern import argument, pattern_of, set_arguments
from inc_graph.ops import DEQUANTIZE, QUANTIZE, UNPACK
from inc_graph.packing import pack
from inc_graph.passes._codes import codes_by_range, codes_of_weight, needs_zero_point
from inc_graph.passes._dynamic import quantize_at_run_time
from inc_graph.passes._place import Maker
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.spec import QSpec, scale_shape
from inc_graph.trained_scales import TRAINED
from inc_graph.weights import Codes, Gram

Group = tuple[str, str]  # name of the value that stands for all that share its scale, and the key of the format
Params = tuple[fx.Node, fx.Node | None]  # reads of a scale and a zero point


@dataclass
class _State:
    gm: fx.GraphModule
    make: Maker
    groups: dict[Group, tuple[torch.Tensor, torch.Tensor]]
    params: dict[tuple[Group, int], Params] = field(default_factory=dict)
    weights: dict[Any, tuple[fx.Node, Codes]] = field(default_factory=dict)
    grams: dict[Any, Gram] | InSequence = field(default_factory=dict)  # name of a gram observer -> what it is to know
    inputs: dict[Any, list[str]] = field(default_factory=dict)  # weight -> gram observers of the layers that share it


@PASSES.register("convert-qdq")
@dataclass(frozen=True)
class ConvertQDQ(Pass):
    """observed -> qdq."""

    name: ClassVar[str] = "convert-qdq"
    requires: ClassVar[str] = "observed"
    ensures: ClassVar[str] = "qdq"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        calls = {
            n: m for n in gm.graph.find_nodes(op="call_module") if isinstance(m := get_attr(gm, n.target), Observer)
        }
        _need_data(list(dict.fromkeys(calls.values())))
        groups = _solve(calls)
        seen = {
            n: m for n in gm.graph.find_nodes(op="call_module") if isinstance(m := get_attr(gm, n.target), GramObserver)
        }
        grams = gm.meta.pop(IN_SEQUENCE, None) or {str(n.target): m.gram() for n, m in seen.items()}
        for node in [*calls, *seen]:
            replace_uses(node, node.args[0])
            gm.graph.erase_node(node)
        state = _State(gm, Maker(gm), groups, grams=grams)
        for node in gm.graph.nodes:
            if (name := peek_meta(node).get("weight", {}).get("gram")) is not None:
                names = state.inputs.setdefault(_identity(gm, node), [])
                names += [name] if name not in names else []
        for value in list(gm.graph.nodes):
            for key, quant in peek_meta(value).get("quant", {}).items():
                _pair(state, value, key, quant)
                report.matched.append(value.name)
            if "weight" in peek_meta(value):
                _weight(state, value)
        erase_dead(gm)
        set_level(gm, "qdq")
        return PassResult(gm, True, report)


def _need_data(observers: list[Observer]) -> None:
    empty = [m for m in observers if m.elements == 0]
    if empty and len(empty) == len(observers):
        raise CalibrationError(
            "the prepared model has seen no calibration data",
            hint="call it on representative inputs first: for x in data: prepared(x)",
        )
    if empty:
        names = ", ".join(m.node for m in empty[:5]) + (" ..." if len(empty) > 5 else "")
        raise CalibrationError(
            f"{len(empty)} of {len(observers)} observed values saw no data: {names}",
            node=empty[0].node,
            module=empty[0].module_path,
            hint="calibrate with inputs that reach this part of the model",
        )


def _solve(calls: dict[fx.Node, Observer]) -> dict[Group, tuple[torch.Tensor, torch.Tensor]]:
    """(scale, zero point) of each group."""
    groups: dict[Group, tuple[torch.Tensor, torch.Tensor]] = {}
    for node, observer in calls.items():
        key = peek_meta(node)["observes"]["key"]
        group = (peek_meta(node.args[0])["quant"][key]["group"], key)  # type: ignore[arg-type]
        if group not in groups:
            groups[group] = observer.calculate_qparams()
    return groups


# ------------------------------------------------------------------------------------------------------- activations
def _params(state: _State, group: Group, ndim: int, spec: QSpec) -> Params:
    """Reads of scale and zero point of a group, for values of rank `ndim` (a view may have changed the rank)."""
    if (group, ndim) not in state.params:
        scale, zero = state.groups[group]
        if scale.ndim != ndim:
            scale, zero = scale.reshape((1,) * ndim), zero.reshape((1,) * ndim)
        name = group[0] if group[1] == "0" else f"{group[0]}_{group[1]}"
        state.params[group, ndim] = _read_params(state, name, scale, zero if needs_zero_point(spec, zero) else None)
    return state.params[group, ndim]


def _read_params(state: _State, name: str, scale: torch.Tensor, zero: torch.Tensor | None) -> Params:
    z = None if zero is None else state.make.read(f"{name}_zero_point", zero)
    return state.make.read(f"{name}_scale", scale), z


def _read_codes(state: _State, name: str, codes: Codes, like: fx.Node) -> fx.Node:
    """The codes of a constant; those of less than 8 bits are kept packed, and unpacked when the graph runs."""
    qtype = codes.spec.type
    if qtype.storage_bits >= 8:
        return state.make.read(name, codes.carrier)
    shape = list(codes.carrier.shape)
    if len(shape) <= 2:
        packed = state.make.read(name, pack(codes.carrier, qtype))
        return state.make.call(UNPACK, (packed, qtype.name, shape), after=packed, like=like)
    # rows are packed each for itself: a kernel of a convolution is too short for one
    packed = state.make.read(name, pack(codes.carrier.flatten(1), qtype))
    flat = [shape[0], math.prod(shape[1:])]
    rows = state.make.call(UNPACK, (packed, qtype.name, flat), after=packed, like=like)
    return state.make.call(_RESHAPE, (rows, shape), after=rows, like=like)


def _pair(state: _State, value: fx.Node, key: str, quant: dict[str, Any]) -> None:
    spec = QSpec.from_json(quant["spec"])
    if spec.dynamic:
        return quantize_at_run_time(state.make, value, key, spec)
    fake: torch.Tensor = value.meta["val"]
    group = (quant["group"], key)
    how = (*_params(state, group, fake.ndim, spec), list(spec.block(fake.ndim)), spec.qtype)
    readers = [u for u in value.users if peek_meta(u).get("reads", {}).get(value.name) == key]
    if value.op == "get_attr":  # a parameter: quantized now
        tensor = get_tensor(state.gm, value)
        codes = codes_by_range(tensor, *(t.reshape((1,) * tensor.ndim) for t in state.groups[group]), spec)
        q = _read_codes(state, f"{value.target}_q", codes, value)
    else:
        q = state.make.call(QUANTIZE, (value, *how), after=value, like=value)
    dq = state.make.call(DEQUANTIZE, (q, *how, fake.dtype), after=q, like=value)
    replace_uses(value, dq, only=readers)


# ----------------------------------------------------------------------------------------------------------- weights
def _weight(state: _State, layer: fx.Node) -> None:
    pattern = pattern_of(layer)
    assert pattern is not None and pattern.weight is not None
    read: Any = argument(layer, pattern.weight)
    annotation, identity = inc_meta(layer)["weight"], _identity(state.gm, layer)
    annotation.pop("mean", None)
    gram = annotation.pop("gram", None)
    tensor = get_tensor(state.gm, read)
    trained = state.gm.meta.get(TRAINED, {}).get(layer.name)
    if identity not in state.weights:
        if trained is None:
            codes = _solved(layer, tensor, annotation, _gram(state, gram, identity))
        else:
            codes = codes_by_range(tensor, *trained, QSpec.from_json(annotation["spec"]))
        name = read.target.replace(".", "_")
        state.weights[identity] = _dequantized(state, name, codes, tensor.dtype, layer), codes
    values, codes = state.weights[identity]
    if isinstance(state.grams, InSequence):
        state.grams.rounded(layer.name, codes)
    set_arguments(layer, {pattern.weight: values})
    if codes.notes:
        order = 0 if codes.order is None else codes.order.nbytes
        annotation["notes"] = {**codes.notes, "bytes": _nbytes(state.gm, values) + order}
    if codes.order is not None:
        order = state.make.read(f"{read.target.replace('.', '_')}_order", codes.order)
        source: Any = layer.args[0]
        set_arguments(layer, {0: state.make.call(_SELECT, (source, -1, order), after=source, like=layer)})


def _identity(gm: fx.GraphModule, layer: fx.Node) -> Any:
    """Equal for layers whose weights become one carrier."""
    pattern, annotation = pattern_of(layer), peek_meta(layer)["weight"]
    assert pattern is not None and pattern.weight is not None
    memory = view_key(get_tensor(gm, argument(layer, pattern.weight)))
    own = layer.name if layer.name in gm.meta.get(TRAINED, {}) else None  # a learned scale is one layer's
    return memory, str(QSpec.from_json(annotation["spec"])), annotation["algorithm"], own


def _gram(state: _State, name: str | None, identity: Any) -> Gram | None:
    """The inputs of a layer, together with those of all layers behind it that share its weight."""
    first = state.grams.get(name)
    others = [n for n in state.inputs.get(identity, []) if n != name]
    if first is None or not others:
        return first
    more = [state.grams.later(n) if isinstance(state.grams, InSequence) else state.grams[n] for n in others]
    return Gram(sum((g.matrix for g in more), first.matrix), first.count + sum(g.count for g in more))


_SELECT = torch.ops.aten.index_select.default
_RESHAPE = torch.ops.aten.reshape.default


def _solved(layer: fx.Node, weight: torch.Tensor, annotation: dict[str, Any], gram: Gram | None) -> Codes:
    start = time.perf_counter()
    try:
        found = codes_of_weight(weight, annotation, gram)
    except IncError as e:  # what the algorithm says, and of which layer
        if e.node is None and e.module is None:
            raise type(e)(e.message, node=layer, module=module_path(layer), hint=e.hint) from e
        raise
    if not found.notes:
        return found
    return replace(found, notes={**found.notes, "seconds": round(time.perf_counter() - start, 4)})


def _nbytes(gm: fx.GraphModule, node: fx.Node) -> int:
    """Bytes of the constants behind a node."""
    if node.op == "get_attr":
        return get_tensor(gm, node).nbytes
    return sum(_nbytes(gm, n) for n in node.all_input_nodes)


def _dequantized(state: _State, name: str, codes: Codes, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """Reads of a constant's codes and of what they mean, and the `dequantize` that puts them together."""
    shape = codes.carrier.shape
    block = codes.spec.block(len(shape))
    q = _read_codes(state, f"{name}_q", codes, like)
    scale = _param(state, f"{name}_scale", codes.scale, scale_shape(shape, block), like)
    zero = _param(state, f"{name}_zero_point", codes.zero_point, scale_shape(shape, block), like)
    args = (q, scale, zero, list(block), codes.spec.qtype, dtype)
    return state.make.call(DEQUANTIZE, args, after=_last(q, scale, zero), like=like)


def _param(
    state: _State, name: str, value: torch.Tensor | Codes | None, shape: tuple[int, ...], like: fx.Node
) -> fx.Node | None:
    """A scale or zero point; one that is quantized itself is dequantized, and then shaped as the block asks for."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return state.make.read(name, value)
    values = _dequantized(state, name, value, torch.float32, like)
    if value.carrier.shape == shape:
        return values
    return state.make.call(_RESHAPE, (values, list(shape)), after=values, like=like)


def _last(*nodes: fx.Node | None) -> fx.Node:
    """That of the nodes which stands behind the others."""
    return max(n for n in nodes if n is not None)
