"""What may be quantized at all: data and parameters that are floats, finite, and not written to.

Which values carry data, which only parameters, and which neither (masks, positions, constant tables):

    data        depends on an input of the model that holds data (floats, or pixels and samples in 8 or 16 bits),
                or is the result of a layer with a weight (an embedding of integers)
    parameter   depends on parameters, and on no data
    integers    depends on inputs in 32 or 64 bits or booleans, or on comparisons and indices, and on no data otherwise
    neither     computed from sizes and buffers alone: a range of positions, a table of sines

Arithmetic does not tell integers that are data (pixels in 64 bits, one-hot features) from masks and positions; who
reads them does. What a layer with a weight reads is data: its weight was learned for it. In products and sums of two
values, integers are taken for a mask or a position. A rule that names an operator overrules all of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from inc_graph.errors import ConfigError, SpecError
from inc_graph.graph import get_attr, get_tensor, is_float, module_path, mutated_attrs, peek_meta, val
from inc_graph.oppattern import OpPattern, argument, pattern_of
from inc_graph.options import needs_inputs
from inc_graph.passes._precision import tensor_limits
from inc_graph.recipe import OpQuant
from inc_graph.spec import PerBlock, PerChannel, PerGroup, QSpec

__all__ = ["DATA", "INTEGERS", "PARAMETER", "Facts", "kinds", "useless", "varying", "weight_spec"]

DATA, PARAMETER, INTEGERS = "data", "parameter", "integers"
_SAMPLES = (torch.uint8, torch.int8, torch.int16)
_WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Facts:
    """What the checks need to know of a graph, collected once. Each check gives a reason to stay float, or None."""

    gm: fx.GraphModule
    mutated: set[str] = field(init=False)
    kinds: dict[fx.Node, str] = field(init=False)
    varying: set[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        self.mutated, self.kinds = mutated_attrs(self.gm), kinds(self.gm)
        self.varying = varying(self.kinds)

    def bad_inputs(self, pattern: OpPattern, node: fx.Node, spec: QSpec | None, named: bool = False) -> str | None:
        """Whether the inputs of `node` may be quantized as `spec` says; None leaves them as they are.

        `named`: the user has named this operator, and knows what its inputs are.
        """
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
            if not (named or self._is_data(pattern, node, value)):
                return f"input {value.name} is a mask, a position or a constant, not data"
            if reason := _misfit(spec, val(value).ndim):
                return f"input {value.name}: {reason}"
        return None

    def _is_data(self, pattern: OpPattern, reader: fx.Node, value: fx.Node) -> bool:
        kind = self.kinds.get(value)
        if kind != INTEGERS:
            return kind is not None
        # a product that became a linear layer may be one of positions and frequencies: nothing says it was learned
        layer = pattern.weight is not None and "was" not in peek_meta(reader)
        return layer or pattern.role == "carrier"  # which moves what its reader has found to be data

    def bad_half(self, pattern: OpPattern, node: fx.Node, half: torch.dtype) -> str | None:
        """Whether `node` may compute in half precision: it and its weight are float32, and what is stored fits."""
        if getattr(val(node), "dtype", None) != torch.float32:
            return f"its result is {getattr(val(node), 'dtype', 'not one tensor')}, not float32"
        return self.bad_weight(pattern, node, None) or tensor_limits(self.gm, node, half, self.varying, self.mutated)

    def bad_weight(self, pattern: OpPattern, node: fx.Node, spec: QSpec | None) -> str | None:
        """Whether the weight of `node`, if it has one, may be quantized as `spec` says."""
        if pattern.weight is None:
            return None
        weight: Any = argument(node, pattern.weight)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed at run time, not a parameter"
        its = "its weight" if weight.target == "weight" else f"its weight {weight.target}"
        if weight.target in self.mutated:
            return f"{its} is a buffer that the model writes to"
        tensor = get_tensor(self.gm, weight).detach()
        if tensor.is_meta:
            return f"{its} is on the meta device and has no values"
        if tensor.dtype not in _WEIGHTS:
            return f"{its} is {tensor.dtype}, not floating point of 16 bits or more"
        if tensor.numel() == 0:
            return f"{its} is empty"
        if not all(map(torch.isfinite, torch.aminmax(tensor))):  # one pass over the memory, and NaN spreads
            return f"{its} holds NaN or infinity"
        if spec is None:
            return None
        try:
            reason = _misfit(weight_spec(spec, pattern, node), tensor.ndim)
        except SpecError as e:
            hint = (
                "set_local(name, config): another group_size, -1 for a whole channel, or dtype='fp32' to leave it float"
            )
            raise ConfigError(e.message, node=node, module=module_path(node), hint=hint) from e
        return f"{its}: {reason}" if reason else None


def useless(pattern: OpPattern, what: OpQuant) -> str | None:
    """Why a rule has nothing to say to operators of this type, or None."""
    if pattern.weight is None and what.activation is None:
        return "it has no weight, and the rule quantizes weights only"
    if what.weight is not None and needs_inputs(what.weight_algorithm):
        name = what.weight_algorithm.partition("{")[0]
        if pattern.name.startswith("conv_transpose"):
            each = "each output of a transposed convolution reads other parts of its kernels"
            return f"{name} rounds against the inputs that all outputs read, and {each}; give it a config of rtn"
        if pattern.name != "linear" and not pattern.name.startswith("conv"):
            return f"{name} rounds against the inputs of linear layers and convolutions; give it a config of rtn or hqq"
    if what.weight is None and (what.activation is None or not pattern.inputs):
        return "the rule leaves both its inputs and its weight float"
    return None


def weight_spec(spec: QSpec, pattern: OpPattern, node: fx.Node) -> QSpec:
    """The format of a rule with the operator's own axes.

    Per group, `axis=-1` stands for the input channels and 0 for the output channels. Along the inputs a kernel of a
    convolution is never split: a group of `size` weights is as many input channels as have that many. Along the outputs
    a group is one weight of each of `size` kernels, all at the same place in them.

    Raises:
        SpecError: a group would be longer than the input, or the output, that it lies along.
    """
    shape = val(argument(node, pattern.weight or 0)).shape
    if isinstance(spec.granularity, PerChannel):
        return replace(spec, granularity=PerChannel(pattern.axis(node)))
    if not isinstance(spec.granularity, PerGroup):
        return spec
    size, out = spec.granularity.size, pattern.axis(node)
    along, kernel = spec.granularity.axis, math.prod(shape[2:])
    if along == 0:
        axis, what, room = out, "output", shape[out]
    else:
        axis, what, room = 1 - out, "input", shape[1 - out] * kernel
    prescribed = size == spec.type.block  # blocks of MX formats may be ragged, and so of a short input as well
    if size > room and not prescribed:
        raise SpecError(f"group_size {size} is larger than the {what} dimension, {room}")
    group = size if size == -1 or along == 0 else max(1, size // kernel)
    sizes = [1 if d != axis else group for d in range(2)] + [-1 if along else 1] * (len(shape) - 2)
    return replace(spec, granularity=PerBlock(tuple(sizes)))


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
    """{node: DATA, PARAMETER or INTEGERS}; nodes that are none of these are missing."""
    found: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if (kind := _kind(gm, node, found)) is not None:
            found[node] = kind
    return found


def varying(kinds: Mapping[fx.Node, str]) -> set[fx.Node]:
    """The nodes that depend on inputs of the model."""
    return {node for node, kind in kinds.items() if kind in (DATA, INTEGERS)}


def _kind(gm: fx.GraphModule, node: fx.Node, found: dict[fx.Node, str]) -> str | None:
    value = val(node)
    values = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, torch.Tensor)]
    if not values or _only_the_shape(node):
        return None
    numbers = any(v.is_floating_point() or v.is_complex() or v.dtype in _SAMPLES for v in values)
    if node.op == "placeholder":
        return DATA if numbers else INTEGERS
    if node.op == "get_attr":
        return PARAMETER if numbers and isinstance(get_attr(gm, str(node.target)), nn.Parameter) else None
    inputs = {found.get(n) for n in node.all_input_nodes}
    if not numbers:
        return INTEGERS if DATA in inputs or INTEGERS in inputs else None
    if DATA in inputs or ((pattern := pattern_of(node)) is not None and pattern.weight is not None):
        return DATA
    return next((kind for kind in (PARAMETER, INTEGERS) if kind in inputs), None)


def _only_the_shape(node: fx.Node) -> bool:
    """True for what is filled anew: `zeros_like`, `new_full`."""
    name = getattr(node.target, "__name__", "")  # of an overload: "zeros_like.default"
    return node.op == "call_function" and ("_like." in name or name.startswith("new_"))
