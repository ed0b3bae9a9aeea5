"""WHERE: what an operator of the normal form means to quantization.

One `OpPattern` describes a family of aten targets: which arguments are activations worth quantizing, which one is the
weight, and what role the operator plays. The annotate pass reads nothing else about an operator, so a new operator is
one file in `passes/patterns/` that registers one of these.

Roles:
    anchor      computes; gains from quantized inputs (convolution, linear, matmul, embedding)
    follower    elementwise; worth quantizing only between quantized neighbours, has its own output scale (add, mul)
    carrier     moves values without changing them; its output has its input's scale (view, max_pool, cat, zero padding)
    activation  part of the anchor or follower that produces its input (relu, gelu); never quantized by itself
    opaque      known, and never quantized in this version; `reason` says why (lstm)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from inc_graph.errors import PatternError
from inc_graph.registry import PATTERNS

__all__ = ["ROLES", "OpPattern", "OperatorInfo", "argument", "pattern_of", "register_pattern", "set_arguments"]


@dataclass(frozen=True)
class OperatorInfo:
    """What a predicate of a user's sees of an operator.

    Attributes:
        name: Path of its module; of a function call, its name in the graph.
        op: Operator type, such as "linear", "conv2d", "matmul" (module class where there is no graph).
        module_type: Class name of the innermost module, "" if there is none.
        weight_shape: Of its weight, None if it has none.
    """

    name: str
    op: str
    module_type: str = ""
    weight_shape: tuple[int, ...] | None = None


ROLES = ("anchor", "follower", "carrier", "activation", "opaque")


@dataclass(frozen=True)
class OpPattern:
    """What quantization needs to know of one operator family.

    Attributes:
        name: Operator type that users name in `set_local` and that backends name in their capability table.
        targets: aten overloads of the normal form.
        role: One of `ROLES`.
        inputs: Argument positions of activations to quantize. A position may hold a list of nodes (cat).
        weight: Argument position of the weight, None if there is none.
        bias: Argument position of the bias, None if the operator takes none. It is added to dimension 1 of the result
            (`linear`: to the last one); passes that fold or correct a bias leave operators without one alone.
        channel_axis: Dimension of the weight that indexes output channels; a callable takes the node.
        modules: Classes and functions that a user may name instead (`torch.nn.Conv2d`, `torch.matmul`).
        check: Extra condition; gives a reason to refuse the node, or None.
        reason: For role "opaque": why it stays float.
    """

    name: str
    targets: tuple[Any, ...]
    role: str = "anchor"
    inputs: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    channel_axis: int | Callable[[fx.Node], int] = 0
    modules: tuple[Any, ...] = ()
    check: Callable[[fx.Node], str | None] = field(default=lambda node: None, repr=False)
    reason: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PatternError(f"pattern '{self.name}': role must be one of {', '.join(ROLES)}, not {self.role!r}")

    def axis(self, node: fx.Node) -> int:
        """Output channel dimension of the weight of `node`."""
        return self.channel_axis(node) if callable(self.channel_axis) else self.channel_axis

    def activations(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes at the quantizable input positions, lists flattened."""
        for position in self.inputs:
            value = argument(node, position)
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, fx.Node):
                    yield item


def register_pattern(pattern: OpPattern) -> OpPattern:
    """Add a pattern to the registry under its name. IncError if the name is taken."""
    _INDEX.clear()
    owner = str(sys._getframe(1).f_globals.get("__name__", "?"))
    return PATTERNS.add(pattern.name, pattern, owner=owner)


_INDEX: dict[Any, OpPattern] = {}


def pattern_of(node: fx.Node) -> OpPattern | None:
    """The pattern whose targets hold this node's, or None. PatternError if two patterns claim one target."""
    if node.op != "call_function":
        return None
    if not _INDEX:
        _INDEX.update(_index())
    found = _INDEX.get(node.target)
    if found is not None and found.name not in PATTERNS:  # removed since
        _INDEX.clear()
        return pattern_of(node)
    return found


def _index() -> dict[Any, OpPattern]:
    index: dict[Any, OpPattern] = {}
    for name, pattern in PATTERNS.items():
        for target in pattern.targets:
            if target in index:
                raise PatternError(f"{target} is claimed by the patterns '{index[target].name}' and '{name}'")
            index[target] = pattern
    return index


def set_arguments(node: fx.Node, new: dict[int, Any]) -> None:
    """Set arguments of an operator call by position; those before them are spelled out, nothing is given twice."""
    args = [argument(node, i) for i in range(max(len(node.args), *(i + 1 for i in new)))]
    for position, value in new.items():
        args[position] = value
    names = [a.name for a in node.target._schema.arguments[: len(args)]]  # type: ignore[union-attr]
    node.args, node.kwargs = tuple(args), {k: v for k, v in node.kwargs.items() if k not in names}


def argument(node: fx.Node, position: int) -> Any:
    """Argument `position` of an operator call, from args, kwargs or the schema's default."""
    if position < len(node.args):
        return node.args[position]
    schema = getattr(node.target, "_schema", None)
    if schema is None or position >= len(schema.arguments):
        return None
    spec = schema.arguments[position]
    return node.kwargs.get(spec.name, spec.default_value)
