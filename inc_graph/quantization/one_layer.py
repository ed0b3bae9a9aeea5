"""A calibrated model with only one layer quantized, for every layer: in a graph, or layer by layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from inc_graph.errors import ConfigError
from inc_graph.graph import get_attr, get_level, module_path, peek_meta
from inc_graph.oppattern import OpPattern, pattern_of
from inc_graph.ops import is_inc
from inc_graph.quantization import module_scope
from inc_graph.quantization.finish import finish, observers_of
from inc_graph.quantization.kept_calls import flat_inputs
from inc_graph.quantization.leaf import Leaf
from inc_graph.recipe import Recipe, Where, get_recipe, operator_name

__all__ = ["Call", "is_graph", "own", "scope_of"]

aten = torch.ops.aten
Call = tuple[tuple[Any, ...], dict[str, Any]]
Operators = list[tuple[fx.Node, OpPattern]]
_PLAIN = re.compile(r"[\w.-]*")


@dataclass(frozen=True)
class Unit:
    """What one name takes: quantized operators of the graph, or of one leaf where there is no graph of the model."""

    name: str
    op: str
    general: bool
    nodes: frozenset[fx.Node]


def is_graph(model: nn.Module) -> bool:
    """Whether this is a graph of ours."""
    return isinstance(model, fx.GraphModule) and "inc" in model.meta


def scope_of(prepared: nn.Module) -> GraphScope | ModuleScope:
    """For a prepared model. ConfigError for one that has no Q-DQ form."""
    if module_scope.is_prepared(prepared):
        return ModuleScope(prepared)
    if is_graph(prepared) and get_level(cast(fx.GraphModule, prepared)) == "observed":
        return GraphScope(cast(fx.GraphModule, prepared))
    hint = "use the strategy 'configs' for this method"
    raise ConfigError(f"the layers of a {type(prepared).__name__} cannot be quantized one at a time", hint=hint)


def own(call: Any) -> Any:
    """A copy: the caller may fill the same tensors with the next batch, and models write to caches they are given."""
    return copy.deepcopy(pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, call))


def _floats(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


# ----------------------------------------------------------------------------------------------------------- the names
class _Names:
    """What can be left float by itself: each quantized operator under the name that takes it alone, if there is one."""

    def __init__(self, operators: Operators) -> None:
        self.operators = operators
        self.path = {n: module_path(n) for n, _ in operators}
        self.own = {n: operator_name(n, p) for n, p in operators}
        self.quantized = frozenset(n for n, _ in operators if "op" in peek_meta(n) and "rule" in peek_meta(n))
        self.at: dict[str, set[fx.Node]] = {}  # path -> quantized operators
        for node in self.quantized:
            self.at.setdefault(self.path[node], set()).add(node)

    def units(self, recipe_of: Callable[[fx.Node], Recipe]) -> list[Unit]:
        """A module that is called several times is one unit; so is what an operator's only name takes besides."""
        found: dict[str, Unit] = {}
        for node, pattern in self.operators:
            if node in self.quantized:
                name = self._name(node)
                general = recipe_of(node).rules[peek_meta(node)["rule"]].where.kind == "all"
                found.setdefault(name, Unit(name, pattern.name, general, self._hits(name) & self.quantized))
        return list(found.values())

    def _name(self, node: fx.Node) -> str:
        """The path of its module, if that takes it alone, or else its name in the graph."""
        path = self.path[node]
        is_module, mine = self.own[node] == path, self.at[path]
        names = (path, f"{path}$") if is_module else (path,) if path and len(mine) == 1 else ()
        for name in names if _PLAIN.fullmatch(path) else ():  # as a regular expression it means itself
            hits = self._hits(name)
            if hits & self.quantized == mine and all(f"{self.path[n]}.".startswith(f"{path}.") for n in hits):
                return name
        return f"{re.escape(path)}$" if is_module else node.name

    def _hits(self, name: str) -> frozenset[fx.Node]:
        where, regex, kind = Where("name", name), re.compile(name), name[:1].isupper()
        return frozenset(
            n
            for n, p in self.operators
            if (kind or self.own[n] == name or regex.match(self.path[n]))
            and where.matches(n, p)  # the cheap test first
        )


# ---------------------------------------------------------------------------------------------------------- in a graph
class GraphScope:
    def __init__(self, observed: fx.GraphModule) -> None:
        self.gm = observed
        self.order: list[fx.Node] = [n for n in observed.graph.nodes if n.op != "call_module"]  # without observers
        operators = [(n, p) for n in self.order if (p := pattern_of(n)) is not None]
        recipe = get_recipe(observed)
        self.units = _Names(operators).units(lambda node: recipe)
        last: dict[fx.Node, fx.Node] = {}
        for node in self.order:
            for value in node.all_input_nodes:
                last[_root(value)] = node
        self.dead: dict[fx.Node, list[fx.Node]] = {}  # node -> what nobody reads after it
        for value, node in last.items():
            self.dead.setdefault(node, []).append(value)

    def settle(self) -> None:
        """After calibration: the Q-DQ form."""
        self.qdq = finish(self.gm, "eager", show=False).graph
        self.forms = {n.name: n for n in self.qdq.graph.nodes}

    def outputs(self, call: Call, unmeasured: dict[str, str]) -> Iterator[tuple[Unit, list[Tensor], list[Tensor]]]:
        """(unit, float outputs, outputs with this unit quantized) for every unit that can be measured."""
        flat = flat_inputs(self.gm, *call)
        holders = [n for n in self.order if n.op == "placeholder"]
        env: dict[str, Any] = {n.name: x for n, x in zip(holders, flat, strict=True)}
        want = self._run(0, dict(env), frozenset())
        starts: dict[fx.Node, list[Unit]] = {}
        for unit in self.units:
            starts.setdefault(min(unit.nodes), []).append(unit)
        for at, node in enumerate(self.order):
            for unit in starts.get(node, ()):
                try:
                    have = self._run(at, dict(env), unit.nodes)
                except Exception as e:  # the reference of one operator: the others can still be measured
                    unmeasured[unit.name] = f"{type(e).__name__}: {e}"
                    continue
                yield unit, want, have
            if node.op != "output":
                self._step(node, env, frozenset())

    def _run(self, start: int, env: dict[str, Any], quantized: frozenset[fx.Node]) -> list[Tensor]:
        for node in self.order[start:]:
            if node.op == "output":
                return _floats(fx.map_arg(node.args, lambda n: self._read(n, env)))
            self._step(node, env, quantized)
        raise AssertionError("a graph ends with its output")

    def _step(self, node: fx.Node, env: dict[str, Any], quantized: frozenset[fx.Node]) -> None:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._read(n, env))
            if node.target is aten.copy_.default:  # a buffer is written at the end of the call: not here
                env[node.name] = args[1]
            elif node in quantized:
                env[node.name] = self._quantized(node.name, env)
            else:
                env[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        for value in self.dead.get(node, ()):
            env.pop(value.name, None)

    def _read(self, node: fx.Node, env: Mapping[str, Any]) -> Any:
        node = _root(node)
        return get_attr(self.gm, str(node.target)) if node.op == "get_attr" else env[node.name]

    def _quantized(self, name: str, env: Mapping[str, Any]) -> Any:
        """What the operator computes in the Q-DQ graph from float values."""

        def value(node: fx.Node) -> Any:
            if node.op == "get_attr":
                return get_attr(self.qdq, str(node.target))
            if is_inc(node):  # also what unpacks weights of less than 8 bits
                return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))  # type: ignore[operator]
            return env[node.name]

        form = self.forms[name]
        return form.target(*fx.map_arg(form.args, value), **fx.map_arg(form.kwargs, value))


def _root(node: fx.Node) -> fx.Node:
    """What an observer observes."""
    while node.op == "call_module":
        node = node.args[0]  # type: ignore[assignment]
    return node


# ------------------------------------------------------------------------------------------------------ layer by layer
class ModuleScope:
    def __init__(self, prepared: nn.Module) -> None:
        self.model = prepared
        self.leaf: dict[fx.Node, Leaf] = {}
        recipes: dict[fx.Node, Recipe] = {}
        operators: Operators = []
        for leaf in module_scope.leaves(prepared):
            graph = cast(fx.GraphModule, leaf.inner)
            recipe = get_recipe(graph)
            for node in graph.graph.nodes:
                if (pattern := pattern_of(node)) is not None:
                    operators.append((node, pattern))
                    self.leaf[node], recipes[node] = leaf, recipe
        self.units = _Names(operators).units(recipes.__getitem__)

    def settle(self) -> None:
        """Each leaf is converted when its turn comes."""

    def outputs(self, call: Call, unmeasured: dict[str, str]) -> Iterator[tuple[Unit, list[Tensor], list[Tensor]]]:
        want = self._run(call)
        for unit in self.units:
            leaf = self.leaf[next(iter(unit.nodes))]
            reason = leaf.reason
            if reason is None and not all(o.elements for o in observers_of(leaf)):
                reason = "no calibration data reached it"
            observed = leaf.inner
            try:
                if reason is None:
                    leaf.inner = finish(cast(fx.GraphModule, observed), "eager", show=False)
                    have = self._run(call)
            except Exception as e:
                reason = f"{type(e).__name__}: {e}"
            finally:
                leaf.inner = observed
            if reason is None:
                yield unit, want, have
            else:
                unmeasured[unit.name] = reason

    def _run(self, call: Call) -> list[Tensor]:
        args, kwargs = own(call)
        return _floats(self.model(*args, **kwargs))
