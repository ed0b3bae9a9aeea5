"""Many calls of one graph, computed node by node and side by side: all of them up to a node, then all to the next.

A call is the values that somebody still has to read: each is dropped after its last reader. What depends on no input is
computed once for all calls. So the whole graph is computed once for each call, wherever the calls stop in between.
While the others go on, the values of a call may wait in a file.

With `fast`, layers and what is computed of their results run under autocast to bfloat16. What stands before the first
layer does not: positions and angles of a rotary embedding are no numbers to be rounded to 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from inc_graph.aside import Aside, Kept, Waiting
from inc_graph.errors import IncError
from inc_graph.graph import get_attr, peek_meta, val

__all__ = ["SideBySide", "why_not"]


def why_not(gm: fx.GraphModule) -> str:
    """What keeps the calls of a graph from being computed like this; "" if nothing does."""
    for node in gm.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return f"{node.name} writes to what it is given, so that calls depend on each other"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.name} is control flow"
        if _draws(node):
            return f"{node.name} draws random numbers"
    return ""


def _draws(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
    given |= {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.get("train", True) is not False and given.get("dropout_p", given.get("p", 1.0)) != 0.0


class _Values:
    """The values of one call by node. Of those that wait in a file, one that is read is in memory until `rest`."""

    def __init__(self, given: dict[fx.Node, Any]) -> None:
        self.kept: dict[fx.Node, Any] = given
        self.read: dict[fx.Node, Any] = {}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.kept

    def __getitem__(self, node: fx.Node) -> Any:
        value = self.kept[node]
        if not isinstance(value, Waiting):
            return value
        if node not in self.read:
            self.read[node] = value.get()
        return self.read[node]

    def __setitem__(self, node: fx.Node, value: Any) -> None:
        self.kept[node] = value

    def drop(self, node: fx.Node) -> None:
        self.kept.pop(node, None)
        self.read.pop(node, None)

    def rest(self, aside: Aside | None) -> None:
        """The call does not go on for a while."""
        self.read.clear()
        if aside is not None:
            self.kept = {n: x if isinstance(x, Waiting) else aside.put(x) for n, x in self.kept.items()}


class SideBySide:
    """The calls, all at one place in the graph.

    Args:
        gm: Functional (see `why_not`). It is not changed, and must not be changed by others. Observers are identities.
        calls: For each call a value for each placeholder; read once.
        goals: Where the calls are to stop. What none of these needs is not computed.
        fast: Compute in bfloat16, see above. What an observer stands for is bfloat16 then as well.
        aside: Where the values of calls wait for the other calls; None: in memory.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        calls: Iterable[Sequence[Any]],
        goals: Collection[fx.Node],
        fast: bool = False,
        aside: Aside | None = None,
    ) -> None:
        needed = _ancestors(goals)
        inputs = list(gm.graph.find_nodes(op="placeholder"))
        self.gm, self.goals = gm, frozenset(goals)
        self.fast = fast
        self.nodes = [n for n in gm.graph.nodes if n in needed and n.op != "placeholder"]
        self.common: set[fx.Node] = set()  # what depends on no input
        self.warm: set[fx.Node] = set()  # layers, and what depends on them
        self.last: dict[fx.Node, list[fx.Node]] = {}  # node -> what nobody reads after it
        reader: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if all(n in self.common for n in node.all_input_nodes):
                self.common.add(node)
            if "weight" in peek_meta(node) or any(n in self.warm for n in node.all_input_nodes):
                self.warm.add(node)
            reader.update(dict.fromkeys(node.all_input_nodes, node))
        for value, node in reader.items():
            self.last.setdefault(node, []).append(value)
        self._aside, self._inputs = aside, inputs
        self._sizes: list[int] = []
        self._largest: list[Any] = []  # the arguments of the largest call; of tensors, their shapes
        self._calls: list[_Values] = []
        for call in calls:
            size = sum(x.numel() for x in call if isinstance(x, Tensor))
            if size >= max(self._sizes, default=0):
                self._largest = [x.to("meta") if isinstance(x, Tensor) else x for x in call]
            self._sizes.append(size)
            self._calls.append(_Values({n: x for n, x in zip(inputs, call, strict=True) if n in needed}))
            self._calls[-1].rest(aside)
        self._shared: dict[fx.Node, Any] = {}
        self._instead: dict[fx.Node, tuple[fx.Node, Tensor]] = {}
        self._place = {node: i for i, node in enumerate(self.nodes)}
        self._at = 0

    # ---------------------------------------------------------------------------------------------------------- running
    def ahead(self, node: fx.Node) -> bool:
        """Whether a node has still to be computed."""
        return self._place.get(node, -1) >= self._at

    def replace(self, reader: fx.Node, value: fx.Node, by: Tensor) -> None:
        """Let one node, which is still ahead, read a tensor instead of a value."""
        self._instead[reader] = value, nn.Parameter(by) if self.fast else by

    def put_aside(self, aside: Aside) -> None:
        """From now on the values of calls wait there."""
        self._aside = aside
        for values in self._calls:
            values.rest(aside)

    def to(self, goal: fx.Node) -> list[Any] | Kept:
        """Let all calls go on until `goal`, which is ahead, is computed; its value in each of them. No gradients."""
        if not self.ahead(goal):
            raise IncError("the calls have passed this node, or do not come there", node=goal)
        start, self._at = self._at, self._place[goal] + 1
        part, nothing = self.nodes[start : self._at], _Values({})
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.fast):
            for node in part:
                if node in self.common:
                    self._shared[node] = self._compute(node, nothing)
            own = [node for node in part if node not in self.common or node in self.last]
            for values in self._calls:
                for node in own:
                    if node not in self.common:
                        values[node] = self._compute(node, values)
                    for dead in self.last.get(node, ()):
                        values.drop(dead)
                values.rest(self._aside)
        for node in part:
            self._instead.pop(node, None)
            for dead in self.last.get(node, ()):
                self._shared.pop(dead, None)
        found = [self._shared[goal] if goal in self.common else values.kept[goal] for values in self._calls]
        return found if self._aside is None else Kept(found, None)

    def held(self) -> list[Any]:
        """The values that are in memory at this moment, for all calls."""
        kept = [x for values in self._calls for x in values.kept.values() if not isinstance(x, Waiting)]
        return [*kept, *self._shared.values()]

    def _compute(self, node: fx.Node, values: _Values) -> Any:
        if node.op == "get_attr":
            return self._constant(node)
        weight, instead = self._instead.get(node, (None, None))

        def read(n: fx.Node) -> Any:
            return instead if n is weight else values[n] if n in values else self._shared[n]

        args, kwargs = fx.map_arg((node.args, node.kwargs), read)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            x: Any = args[0]  # cast once for all layers that read it
            return x.to(torch.bfloat16) if self.fast and isinstance(x, Tensor) and x.dtype == torch.float32 else x
        call: Any = node.target
        if not self.fast:
            return call(*args, **kwargs)
        torch.set_autocast_enabled("cpu", node in self.warm)
        try:
            return call(*args, **kwargs)
        except RuntimeError:  # some operators want what they were captured with
            if node not in self.warm:
                raise
            torch.set_autocast_enabled("cpu", False)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _as_captured(read(n), val(n)))
            return call(*args, **kwargs)

    def _constant(self, node: fx.Node) -> Any:
        value = get_attr(self.gm, str(node.target))
        if self.fast and isinstance(value, Tensor) and value.dtype == torch.float32:
            return nn.Parameter(value.detach())  # autocast keeps the cast of what wants a gradient
        return value

    # ----------------------------------------------------------------------------------------------------------- memory
    def waiting_bytes(self) -> float:
        """About the most that all calls hold while they wait at one of the goals; inf where a size is not known."""
        table = _symbols(self._inputs, self._largest)
        read = {n for dead in self.last.values() for n in dead}
        alive = sum(_bytes(val(n), table) for n in self._inputs if n in read)
        shared = most = 0.0
        for node in self.nodes:
            size = _bytes(val(node), table) if node.op != "get_attr" else 0.0
            alive, shared = (alive, shared + size) if node in self.common else (alive + size, shared)
            for dead in self.last.get(node, ()):
                if dead.op != "get_attr":
                    size = _bytes(val(dead), table)
                    alive, shared = (alive, shared - size) if dead in self.common else (alive - size, shared)
            if node in self.goals:
                most = max(most, shared + alive * sum(self._sizes) / max(max(self._sizes, default=0), 1))
        return most


def _ancestors(goals: Iterable[fx.Node]) -> set[fx.Node]:
    found, todo = set(goals), list(goals)
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found]
        found.update(new)
        todo += new
    return found


def _as_captured(value: Any, fake: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(fake, Tensor) and value.dtype != fake.dtype:
        return value.to(fake.dtype)
    return value


def _symbols(inputs: list[fx.Node], call: Sequence[Any]) -> dict[Any, int]:
    """What the symbolic sizes of a graph are in one call."""
    found: dict[Any, int] = {}
    for node, x in zip(inputs, call, strict=False):
        fake = val(node)
        if isinstance(fake, Tensor) and isinstance(x, Tensor):
            pairs: Any = zip(fake.shape, x.shape, strict=True)
            found |= {d.node.expr: n for d, n in pairs if isinstance(d, torch.SymInt) and d.node.expr.is_Symbol}
        elif isinstance(fake, torch.SymInt):
            found[fake.node.expr] = x
    return found


def _bytes(value: Any, table: dict[Any, int]) -> float:
    total = 0.0
    for x in pytree.tree_leaves(value):
        if isinstance(x, Tensor):
            total += x.element_size() * math.prod(_size(d, table) for d in x.shape)
    return total


def _size(size: Any, table: dict[Any, int]) -> float:
    if (node := getattr(size, "node", None)) is None:
        return float(size)
    found = node.expr.subs(table)
    return int(found) if found.is_number else math.inf
