"""What may be quantized at all: data and parameters that are floats, finite, and not written to.

Which values carry data, which only parameters, and which neither (masks, positions, constant tables):

    data        depends on an input of the model that holds data (floats, or pixels and samples in 8 or 16 bits),
                or is the result of a layer with a weight (an embedding of integers)
    parameter   depends on parameters, and on no data
    neither     computed from 32- and 64-bit integers, booleans, sizes and buffers: a mask, a position, a table of sines

A value made from booleans or indices is a mask or a position, whatever these were computed from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from inc_graph.errors import SpecError
from inc_graph.graph import get_attr, get_tensor, is_float, mutated_attrs, val
from inc_graph.oppattern import OpPattern, argument, pattern_of
from inc_graph.recipe import OpQuant
from inc_graph.spec import PerChannel, QSpec

__all__ = ["DATA", "PARAMETER", "Facts", "kinds", "useless", "weight_spec"]

DATA, PARAMETER = "data", "parameter"
_SAMPLES = (torch.uint8, torch.int8, torch.int16)
_WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Facts:
    """What the checks need to know of a graph, collected once. Each check gives a reason to stay float, or None."""

    gm: fx.GraphModule
    mutated: set[str] = field(init=False)
    kinds: dict[fx.Node, str] = field(init=False)

    def __post_init__(self) -> None:
        self.mutated, self.kinds = mutated_attrs(self.gm), kinds(self.gm)

    def bad_inputs(self, pattern: OpPattern, node: fx.Node, spec: QSpec | None) -> str | None:
        """Whether the inputs of `node` may be quantized as `spec` says; None leaves them as they are."""
        if not is_float(node):
            return f"its result is {getattr(val(node), 'dtype', 'not one tensor')}, not floating point"
        if spec is None:
            return None
        others = _other_inputs(pattern, node)
        for value in pattern.activations(node):
            if value in others:
                return f"input {value.name} is read in another place of the same operator too"
            if not is_float(value):
                return f"input {value.name} is not floating point"
            if value.op == "get_attr" and value.target in self.mutated:
                return f"input {value.target} is a buffer that the model writes to"
            if value not in self.kinds:
                return f"input {value.name} is a mask, a position or a constant, not data"
            if reason := _misfit(spec, val(value).ndim):
                return f"input {value.name}: {reason}"
        return None

    def bad_weight(self, pattern: OpPattern, node: fx.Node, spec: QSpec | None) -> str | None:
        """Whether the weight of `node`, if it has one, may be quantized as `spec` says."""
        if pattern.weight is None:
            return None
        weight: Any = argument(node, pattern.weight)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed at run time, not a parameter"
        if weight.target in self.mutated:
            return f"its weight {weight.target} is a buffer that the model writes to"
        tensor = get_tensor(self.gm, weight).detach()
        if tensor.is_meta:
            return f"its weight {weight.target} is on the meta device and has no values"
        if tensor.dtype not in _WEIGHTS:
            return f"its weight {weight.target} is {tensor.dtype}, not floating point of 16 bits or more"
        if tensor.numel() == 0:
            return f"its weight {weight.target} is empty"
        if not all(map(torch.isfinite, torch.aminmax(tensor))):  # one pass over the memory, and NaN spreads
            return f"its weight {weight.target} holds NaN or infinity"
        if spec is not None and (reason := _misfit(weight_spec(spec, pattern, node), tensor.ndim)):
            return f"its weight {weight.target}: {reason}"
        return None


def useless(pattern: OpPattern, what: OpQuant) -> str | None:
    """Why a rule has nothing to say to operators of this type, or None."""
    if pattern.weight is None and what.activation is None:
        return "it has no weight, and the rule quantizes weights only"
    if what.weight is None and (what.activation is None or not pattern.inputs):
        return "the rule leaves both its inputs and its weight float"
    return None


def weight_spec(spec: QSpec, pattern: OpPattern, node: fx.Node) -> QSpec:
    """The format of a rule with the operator's own channel axis."""
    if isinstance(spec.granularity, PerChannel):
        return replace(spec, granularity=PerChannel(pattern.axis(node)))
    return spec


def _other_inputs(pattern: OpPattern, node: fx.Node) -> set[fx.Node]:
    """Nodes that the operator reads where it is not quantized (an addend, a weight)."""
    found: set[fx.Node] = set()
    rest = [a for i, a in enumerate(node.args) if i not in pattern.inputs]
    fx.node.map_arg((rest, node.kwargs), lambda n: found.add(n) or n)  # type: ignore[func-returns-value]
    return found


def _misfit(spec: QSpec, ndim: int) -> str | None:
    try:
        spec.block(ndim)
    except SpecError as e:
        return e.message
    return None


def kinds(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """{node: DATA or PARAMETER}; nodes that are neither are missing."""
    found: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if not _may_hold_data(node):
            continue
        if node.op == "placeholder":
            found[node] = DATA
        elif node.op == "get_attr":
            if isinstance(get_attr(gm, str(node.target)), nn.Parameter):
                found[node] = PARAMETER
        else:
            inputs = {found.get(n) for n in node.all_input_nodes}
            if DATA in inputs or ((pattern := pattern_of(node)) is not None and pattern.weight is not None):
                found[node] = DATA
            elif PARAMETER in inputs:
                found[node] = PARAMETER
    return found


def _may_hold_data(node: fx.Node) -> bool:
    value = val(node)
    values = value if isinstance(value, list | tuple) else [value]
    if not any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.dtype in _SAMPLES) for v in values):
        return False
    name = getattr(node.target, "__name__", "")  # of an overload: "zeros_like.default"
    return not (node.op == "call_function" and ("_like." in name or name.startswith("new_")))
