"""Patterns over the graph, as data.

    linear = P(aten.linear, Any("x"), Attr("w"), Any("b"))
    relu_of_sum = P(aten.relu, P(aten.add.Tensor, Any("a"), linear, commutative=True, single_use=True, name="sum"))

A pattern is matched at a node, its root, and against the arguments below it. `match` gives a `Match`, or a falsy
`NoMatch` that says what was wrong where: the complaint of the attempt that got furthest.

    P(ops, *args, **kw)   a call; args left out are not looked at; kw are argument names of the operator's schema
    Any("x")              anything: a node, a constant, None        Attr("w")    a read of an attribute
    Const(value, "c")     a constant (any, if no value is given)    Or(p, q)     the first that fits, then the next
    Opt(P(op, inner))     the call, or `inner` in its place         Out(i, p)    output i of a multi-output call
    5, None, [1, 1]       in place of a pattern: that very value

Equal names must bind equal values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any as Anything

import torch
from torch import fx

from inc_graph.errors import PatternError

__all__ = ["Any", "Attr", "Const", "Match", "NoMatch", "Opt", "Or", "Out", "P", "Pattern", "match"]

_UNSET = object()


@dataclass(frozen=True)
class Match:
    """A pattern that fitted. `m["x"]` is what name x is bound to; `nodes` are the matched calls, the root first."""

    root: fx.Node
    bindings: dict[str, Anything]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Anything:
        return self.bindings[name]

    def get(self, name: str, default: Anything = None) -> Anything:
        """The binding, or `default` if its optional part was absent."""
        return self.bindings.get(name, default)


@dataclass(frozen=True)
class NoMatch:
    """Why a pattern did not fit: a reason, the node it is about, and how many calls had matched before. Falsy."""

    reason: str
    node: fx.Node | None
    depth: int = 0

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.node.name}: {self.reason}" if self.node is not None else self.reason


@dataclass(frozen=True)
class _State:
    bindings: dict[str, Anything]
    nodes: tuple[fx.Node, ...] = ()


class _Search:
    """One attempt: keeps the complaint that came deepest."""

    def __init__(self, root: fx.Node) -> None:
        self.at = root
        self.miss: NoMatch | None = None

    def fail(self, reason: str, value: Anything, user: fx.Node | None, state: _State) -> None:
        node = value if isinstance(value, fx.Node) else user
        if self.miss is None or len(state.nodes) > self.miss.depth:
            self.miss = NoMatch(reason, node, len(state.nodes))

    def bind(self, name: str | None, value: Anything, user: fx.Node | None, state: _State) -> _State | None:
        if not name:
            return state
        bound = state.bindings.get(name, _UNSET)
        if bound is _UNSET:
            return _State({**state.bindings, name: value}, state.nodes)
        if _equal(bound, value):
            return state
        self.fail(f"'{name}' is already {_describe(bound)}, not {_describe(value)}", value, user, state)
        return None


class Pattern:
    """Base of all patterns."""

    def walk(self, value: Anything, user: fx.Node | None, state: _State, search: _Search) -> Iterator[_State]:
        """All ways this pattern fits `value`, an argument of `user`."""
        raise NotImplementedError

    def targets(self) -> set[Anything] | None:
        """Operators that a root can have; None if it can be anything."""
        return None

    def depth(self) -> int:
        """Longest chain of calls."""
        return 0


@dataclass(frozen=True)
class Any(Pattern):
    """Any value; bound to `name` if one is given."""

    name: str | None = None

    def walk(self, value: Anything, user: fx.Node | None, state: _State, search: _Search) -> Iterator[_State]:
        new = search.bind(self.name, value, user, state)
        if new is not None:
            yield new


@dataclass(frozen=True)
class Attr(Pattern):
    """A get_attr node: a weight or another tensor of the module."""

    name: str | None = None

    def walk(self, value: Anything, user: fx.Node | None, state: _State, search: _Search) -> Iterator[_State]:
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            search.fail(f"{_describe(value)} is not an attribute", value, user, state)
        elif (new := search.bind(self.name, value, user, state)) is not None:
            yield new


@dataclass(frozen=True)
class Const(Pattern):
    """A value that is no node; equal to `value` if one is given. Lists and tuples are alike."""

    value: Anything = _UNSET
    name: str | None = None

    def walk(self, value: Anything, user: fx.Node | None, state: _State, search: _Search) -> Iterator[_State]:
        if _has_node(value):
            search.fail(f"{_describe(value)} is not a constant", value, user, state)
        elif self.value is not _UNSET and not _equal(self.value, value):
            search.fail(f"{value!r} is not {self.value!r}", value, user, state)
        elif (new := search.bind(self.name, value, user, state)) is not None:
            yield new


@dataclass(frozen=True)
class Or(Pattern):
    """The first alternative that fits; the next ones if the rest of the pattern then does not."""

    options: tuple[Pattern, ...]

    def __init__(self, *options: Anything) -> None:
        object.__setattr__(self, "options", tuple(map(_as_pattern, options)))

    def walk(self, value: Anything, user: fx.Node | None, state: _State, search: _Search) -> Iterator[_State]:
        for option in self.options:
            yield from option.walk(value, user, state, search)

    def targets(self) -> set[Anything] | None:
        found: set[Anything] = set()
        for option in self.options:
            if (targets := option.targets()) is None:
                return None
            found |= targets
        return found

    def depth(self) -> int:
        return max((o.depth() for o in self.options), default=0)


@dataclass(frozen=True)
class P(Pattern):
    """A call of one of `ops` with arguments that fit.

    Args:
        ops: An operator overload, a packet (all its overloads), a plain function, or a tuple of them.
        args: Patterns or constants for the leading arguments.
        name: Binds the node.
        single_use: The node must have exactly one user.
        commutative: The first two arguments may be swapped.
        kw: Patterns by the operator's argument name; defaults count as given.
    """

    ops: tuple[Anything, ...]
    args: tuple[Pattern, ...]
    kw: dict[str, Pattern] = field(hash=False)
    name: str | None
    single_use: bool
    commutative: bool

    def __init__(
        self,
        ops: Anything,
        *args: Anything,
        name: str | None = None,
        single_use: bool = False,
        commutative: bool = False,
        **kw: Anything,
    ) -> None:
        expanded: list[Anything] = []
        for op in ops if isinstance(ops, tuple) else (ops,):
            if isinstance(op, torch._ops.OpOverloadPacket):
                expanded += [getattr(op, overload) for overload in op.overloads()]
            elif callable(op):
                expanded.append(op)
            else:
                raise PatternError(f"{op!r} is not an operator")
        if commutative and len(args) < 2:
            raise PatternError("a commutative call needs patterns for its first two arguments")
        values = (tuple(expanded), tuple(map(_as_pattern, args)), {k: _as_pattern(v) for k, v in kw.items()})
        for key, value in zip(("ops", "args", "kw"), values, strict=True):
            object.__setattr__(self, key, value)
        for key, flag in (("name", name), ("single_use", single_use), ("commutative", commutative)):
            object.__setattr__(self, key, flag)

    def targets(self) -> set[Anything] | None:
        return set(self.ops)

    def depth(self) -> int:
        return 1 + max((p.depth() for p in (*self.args, *self.kw.values())), default=0)

    def walk(self, value: Anything, user: fx.Node | None, state: _State, search: _Search) -> Iterator[_State]:
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in self.ops:
            search.fail(f"{_describe(value)} is not {' or '.join(map(_op_name, self.ops))}", value, user, state)
            return
        if self.single_use and len(value.users) != 1:
            search.fail(f"has {len(value.users)} users, must have one", value, user, state)
            return
        new = search.bind(self.name, value, user, state)
        if new is None:
            return
        new = _State(new.bindings, (*new.nodes, value))
        wanted: list[tuple[int | str, Pattern]] = [(i, p) for i, p in enumerate(self.args)]
        orders = [wanted]
        if self.commutative:
            orders.append([(1, wanted[0][1]), (0, wanted[1][1]), *wanted[2:]])
        for order in orders:
            pairs = [(_argument(value, key), p) for key, p in [*order, *self.kw.items()]]
            if any(found is _UNSET for found, _ in pairs):
                search.fail("has fewer arguments than the pattern", value, user, new)
                continue
            yield from _walk_all(pairs, value, new, search)


@dataclass(frozen=True)
class Opt(Pattern):
    """The call `call`, or in its absence what its first argument must fit."""

    call: P

    def __post_init__(self) -> None:
        if not isinstance(self.call, P) or not self.call.args:
            raise PatternError("Opt takes a P with at least one argument")

    def walk(self, value: Anything, user: fx.Node | None, state: _State, search: _Search) -> Iterator[_State]:
        if isinstance(value, fx.Node) and value.op == "call_function" and value.target in self.call.ops:
            yield from self.call.walk(value, user, state, search)
        yield from self.call.args[0].walk(value, user, state, search)

    def targets(self) -> set[Anything] | None:
        inner = self.call.args[0].targets()
        return None if inner is None else inner | set(self.call.ops)

    def depth(self) -> int:
        return self.call.depth()


@dataclass(frozen=True)
class Out(Pattern):
    """Output `index` (None: any) of a multi-output call: a getitem node over `call`."""

    index: int | None
    call: Pattern
    name: str | None = None

    def walk(self, value: Anything, user: fx.Node | None, state: _State, search: _Search) -> Iterator[_State]:
        index = Any() if self.index is None else Const(self.index)
        yield from P(operator.getitem, self.call, index, name=self.name).walk(value, user, state, search)

    def targets(self) -> set[Anything] | None:
        return {operator.getitem}

    def depth(self) -> int:
        return 1 + self.call.depth()


def match(pattern: Pattern, node: fx.Node) -> Match | NoMatch:
    """Fit `pattern` with its root at `node`. Cost depends on the pattern only."""
    search = _Search(node)
    for state in pattern.walk(node, None, _State({}), search):
        return Match(node, state.bindings, state.nodes)
    return NoMatch("does not fit", node) if search.miss is None else search.miss


# ---------------------------------------------------------------------------------------------------------- helpers
def _as_pattern(value: Anything) -> Pattern:
    return value if isinstance(value, Pattern) else Const(value)


def _walk_all(pairs: list[tuple[Anything, Pattern]], user: fx.Node, state: _State, search: _Search) -> Iterator[_State]:
    if not pairs:
        yield state
        return
    (value, pattern), rest = pairs[0], pairs[1:]
    for new in pattern.walk(value, user, state, search):
        yield from _walk_all(rest, user, new, search)


def _argument(node: fx.Node, key: int | str) -> Anything:
    """Argument by position or name, from args, kwargs or the schema's default; `_UNSET` if there is none."""
    if isinstance(key, int) and key < len(node.args):
        return node.args[key]
    if isinstance(key, str) and key in node.kwargs:
        return node.kwargs[key]
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if key not in (position, argument.name):
            continue
        if position < len(node.args):
            return node.args[position]
        if argument.name in node.kwargs:
            return node.kwargs[argument.name]
        return argument.default_value
    return _UNSET


def _plain(value: Anything) -> Anything:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _equal(a: Anything, b: Anything) -> bool:
    if a is b:
        return True
    if isinstance(a, fx.Node) or isinstance(b, fx.Node) or isinstance(a, bool) != isinstance(b, bool):
        return False
    return bool(_plain(a) == _plain(b))


def _has_node(value: Anything) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(map(_has_node, value)))


def _op_name(op: Anything) -> str:
    if isinstance(op, torch._ops.OpOverload):
        return str(op).removesuffix(".default")
    return getattr(op, "__name__", str(op))


def _describe(value: Anything) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    return _op_name(value.target) if value.op == "call_function" else value.op
