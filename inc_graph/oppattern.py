"""WHERE: what an operator of the normal form means to quantization.

One `OpPattern` describes a family of aten targets: which arguments are activations worth quantizing, which one is the
weight, and what role the operator plays. The annotate pass reads nothing else about an operator, so a new operator is one
file in `passes/patterns/` that registers one of these.

Roles:
    anchor      computes; gains from quantized inputs (convolution, linear, matmul, embedding)
    follower    elementwise; worth quantizing only between quantized neighbours, has its own output scale (add, mul)
    carrier     moves values without changing them; its output has its input's scale (view, max_pool, cat, pad with zero)
    activation  part of the anchor or follower that produces its input (relu, gelu); never quantized by itself
    opaque      known, and never quantized in this version; `reason` says why (lstm)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from inc_graph.errors import PatternError
from inc_graph.registry import PATTERNS

__all__ = ["ROLES", "OpPattern", "argument", "call_args", "pattern_of", "register_pattern"]

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
    return PATTERNS.add(pattern.name, pattern)


_INDEX: dict[Any, OpPattern] = {}


def pattern_of(node: fx.Node) -> OpPattern | None:
    """The pattern whose targets hold this node's, or None. PatternError if two patterns claim one target."""
    if node.op != "call_function":
        return None
    if not _INDEX:
        for name, pattern in PATTERNS.items():
            for target in pattern.targets:
                if target in _INDEX:
                    raise PatternError(f"{target} is claimed by the patterns '{_INDEX[target].name}' and '{name}'")
                _INDEX[target] = pattern
    return _INDEX.get(node.target)


def call_args(node: fx.Node) -> list[Any]:
    """Arguments of an operator call by position, keyword arguments and the schema's defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = list(node.args)
    for argument_ in schema.arguments[len(given) :]:
        given.append(node.kwargs.get(argument_.name, argument_.default_value))
    return given


def argument(node: fx.Node, position: int) -> Any:
    """Argument `position` of an operator call, from args, kwargs or the schema's default."""
    if position < len(node.args):
        return node.args[position]
    schema = getattr(node.target, "_schema", None)
    if schema is None or position >= len(schema.arguments):
        return None
    spec = schema.arguments[position]
    return node.kwargs.get(spec.name, spec.default_value)
