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

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from inc_graph.errors import PatternError
from inc_graph.graph import module_path, module_type, peek_meta
from inc_graph.registry import PATTERNS

__all__ = [
    "ROLES", "Named", "OpPattern", "OperatorInfo", "argument", "named", "names_of_type", "operator_name", "pattern_of",
    "pattern_of_module", "register_pattern", "set_arguments", "types_of_module",
]  # fmt: skip


@dataclass(frozen=True)
class OperatorInfo:
    """What a predicate of a user's sees of an operator.

    Attributes:
        name: Path of its module; of a function call, its name in the graph.
        op: Operator type, such as "linear", "conv2d", "matmul" (module class where there is no graph).
        module_type: Class name of the innermost module, "" if there is none.
        weight_shape: Of its weight, None if it has none (relu, add).
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


# ------------------------------------------------------------------------------------------ what users call an operator
@dataclass(frozen=True)
class Named:
    """All that a rule can know an operator by, be it a node of a graph or a module.

    Attributes:
        path: Of the innermost module.
        name: See `operator_name`.
        types: Every name of its type: pattern, aten name, functions, classes, innermost module.
        weighted: Whether it has a weight: it is what its module does, then, whatever class that is of.
    """

    path: str
    name: str
    types: frozenset[str]
    weighted: bool = False


def named(node: fx.Node, pattern: OpPattern) -> Named:
    """The names of an operator of a graph.

    Where a pass has spelled it in another way, its types are also those it had (`was` in its annotations).
    """
    types = _types(pattern, node.target, module_type(node), peek_meta(node).get("was"))
    return Named(module_path(node), operator_name(node, pattern), types, pattern.weight is not None)


def operator_name(node: fx.Node, pattern: OpPattern) -> str:
    """The path of the module that is this operator; of a function call, its name in the graph.

    A module is the operator if its class is one that the pattern names, or is derived from one, or if the weight is its
    own.
    """
    path, inner = module_path(node), module_type(node)
    weight = argument(node, pattern.weight) if pattern.weight is not None else None
    its_own = bool(path) and isinstance(weight, fx.Node) and weight.target == f"{path}.weight"
    if its_own or inner in _types(pattern, node.target, None, None):
        return path
    kind = _class_of(node, inner or "")
    return path if any(c in pattern.modules for c in getattr(kind, "__mro__", ())) else node.name


def _class_of(node: fx.Node, inner: str) -> Any:
    """The class of the innermost module: a captured graph knows its name only."""
    frames: list[Any] = list((node.meta.get("nn_module_stack") or {}).values())
    if frames and isinstance(frames[-1][1], type):
        return frames[-1][1]
    parts = inner.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if (found := sys.modules.get(".".join(parts[:i]))) is not None:
            for part in parts[i:]:
                found = getattr(found, part, None)
            return found
    return None


@functools.lru_cache(maxsize=4096)
def _types(pattern: OpPattern, target: Any, inner: str | None, was: str | None) -> frozenset[str]:
    names = {pattern.name, str(target)}
    if (schema := getattr(target, "_schema", None)) is not None:
        names.add(schema.name)
    for module in pattern.modules:
        names |= set(names_of_type(module))
    if inner is not None:
        names |= {inner, inner.rpartition(".")[2]}
    if was is not None and was in PATTERNS:
        names |= {was, *(n for module in PATTERNS.get(was).modules for n in names_of_type(module))}
    return frozenset(names)


def pattern_of_module(kind: type) -> OpPattern | None:
    """The pattern of what a module of this class computes, None if there is none; a derived class does what its base
    does."""
    for base in kind.__mro__:
        if (found := next((p for _, p in PATTERNS.items() if base in p.modules), None)) is not None:
            return found
    return None


def types_of_module(kind: Any) -> frozenset[str]:
    """As `Named.types`, of a module class, or of the short name of one where no more is known."""
    if isinstance(kind, type):
        own, pattern = set(names_of_type(kind)), pattern_of_module(kind)
    else:
        own = {kind}
        pattern = next((p for _, p in PATTERNS.items() if kind in [names_of_type(m)[0] for m in p.modules]), None)
    return frozenset(own) if pattern is None else _types(pattern, pattern.targets[0], None, None) | own


def names_of_type(kind: Any) -> tuple[str, str]:
    """(short, qualified) name of a module class or function."""
    short = getattr(kind, "__name__", str(kind))
    name = getattr(kind, "__qualname__", short)
    if "<locals>" in name and not isinstance(kind, type):  # torch makes its pooling functions in one that names them so
        name = short
    return short, f"{getattr(kind, '__module__', None) or 'torch'}.{name}"
