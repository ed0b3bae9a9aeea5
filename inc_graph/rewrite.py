"""Rules and the driver that applies them.

A rule is a pattern, an optional check that can refuse a match with a reason, and a rewrite. The driver looks at each
node whose operator can be a rule's root, applies the first rule that fits, and then looks again at what the rewrite
made and at the users of that, until nothing fits. It never recompiles, and erases only matched nodes that lost their
last user: call `erase_dead` once, afterwards.

The cost is linear in the size of the graph plus the number of rewrites. A rule set that rewrites its own results
for ever stops with an error that names the rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from inc_graph.errors import PatternError
from inc_graph.graph import Fuel, current_fuel, current_pass, editing
from inc_graph.pattern import Match, NoMatch, Pattern, match

__all__ = ["Miss", "RewriteReport", "Rule", "apply_rules"]


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: Stands in reports, errors and in the provenance of new nodes.
        pattern: What to look for.
        rewrite: `rewrite(gm, match)` changes the graph; it need not erase the matched nodes.
        check: `check(match)` gives a reason to leave the match alone, or None.
    """

    name: str
    pattern: Pattern
    rewrite: Callable[[fx.GraphModule, Match], None] = field(repr=False)
    check: Callable[[Match], str | None] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Miss:
    """A node where a rule could have applied and did not. `depth`: how many nodes had fitted."""

    rule: str
    node: str
    reason: str
    depth: int


@dataclass
class RewriteReport:
    """What the rules did.

    `applied` counts per rule, 0 for one that never fitted; `matched` names the roots; `misses` are of the final graph.
    """

    applied: dict[str, int] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    matched: list[str] = field(default_factory=list)
    out_of_fuel: bool = False

    @property
    def modified(self) -> bool:
        return any(self.applied.values())

    def closest(self, rule: str) -> Miss | None:
        """The miss of a rule that came nearest to a match."""
        return max((m for m in self.misses if m.rule == rule), key=lambda m: m.depth, default=None)

    def unused(self) -> list[str]:
        """Rules that never applied."""
        return [name for name, count in self.applied.items() if count == 0]


@dataclass(frozen=True)
class _Trail:
    """The rewrites that led to a node: a linked list, so that extending it costs nothing."""

    rule: str
    before: _Trail | None
    length: int

    def names(self, limit: int = 32) -> list[str]:
        found: list[str] = []
        at: _Trail | None = self
        while at is not None and limit:
            found.append(at.rule)
            at, limit = at.before, limit - 1
        return sorted(set(found))


def apply_rules(
    gm: fx.GraphModule, rules: Sequence[Rule], *, fuel: Fuel | int | None = None, max_rounds: int = 10
) -> RewriteReport:
    """Apply `rules` everywhere, in graph order, earlier rules first, until none fits.

    Args:
        gm: Changed in place, not recompiled.
        rules: Names must differ.
        fuel: At most so many rewrites; default is the fuel of the pipeline (`INC_FUEL`).
        max_rounds: Sweeps over the graph before giving up on rules that never settle.

    Raises:
        PatternError: if rules undo each other; the message names them.
    """
    driver = _Driver(gm, rules, Fuel(fuel) if isinstance(fuel, int) else fuel or current_fuel())
    for _ in range(max_rounds):
        if not driver.sweep():
            return driver.report
    raise _unsettled(driver.last_fired, f"still rewriting after {max_rounds} rounds")


def _unsettled(names: list[str], how: str) -> PatternError:
    what = f"rule '{names[0]}' applies to its own result" if len(names) == 1 else "rules undo each other: "
    what += "" if len(names) == 1 else ", ".join(f"'{n}'" for n in names)
    return PatternError(f"{what} ({how})", hint="let a check refuse what the other rule (or the same one) has made")


class _Driver:
    def __init__(self, gm: fx.GraphModule, rules: Sequence[Rule], fuel: Fuel | None) -> None:
        self.gm, self.fuel = gm, fuel
        self.report = RewriteReport({r.name: 0 for r in rules})
        if len(self.report.applied) != len(rules):
            raise PatternError("two rules have the same name")
        self.index: dict[Any, list[Rule]] = {}
        self.anywhere: list[Rule] = []
        order = {r.name: i for i, r in enumerate(rules)}
        for rule in rules:
            targets = rule.pattern.targets()
            for target in targets or ():
                self.index.setdefault(target, []).append(rule)
            if targets is None:
                self.anywhere.append(rule)
        if self.anywhere:
            for target, found in self.index.items():
                self.index[target] = sorted([*found, *self.anywhere], key=lambda r: order[r.name])
        self.depth = max((r.pattern.depth() for r in rules), default=0)
        self.trails: dict[fx.Node, _Trail] = {}
        self.limit = len(gm.graph.nodes) + 1000  # a rule may unroll something: no settling rule goes on for so long
        self.last_fired: list[str] = []

    def rules_for(self, node: fx.Node) -> list[Rule]:
        return self.index.get(node.target, self.anywhere) if node.op == "call_function" else self.anywhere

    def sweep(self) -> bool:
        """Look at every node once, and again at what changed. True if there was a rewrite."""
        self.report.misses.clear()
        misses: dict[tuple[str, fx.Node], Miss] = {}
        fired: set[str] = set()
        todo = [n for n in self.gm.graph.nodes if self.rules_for(n)]
        todo.reverse()  # a stack: results of a rewrite come first
        while todo:
            node = todo.pop()
            if node._erased:
                continue
            for rule in self.rules_for(node):
                found = self.try_rule(rule, node)
                if isinstance(found, NoMatch):
                    misses[rule.name, node] = Miss(rule.name, node.name, str(found), found.depth)
                    continue
                if self.fuel is not None and not self.fuel.take():
                    self.report.out_of_fuel = True
                    break
                todo += reversed(self.fire(rule, found))
                fired.add(rule.name)
                break
        self.report.misses += [m for (_, node), m in misses.items() if not node._erased]
        self.last_fired = sorted(fired)
        return bool(fired)

    def try_rule(self, rule: Rule, node: fx.Node) -> Match | NoMatch:
        found = match(rule.pattern, node)
        if isinstance(found, Match) and rule.check is not None and (reason := rule.check(found)) is not None:
            return NoMatch(reason, node, len(found.nodes) + 1)
        return found

    def fire(self, rule: Rule, found: Match) -> list[fx.Node]:
        """Apply the rule; returns the nodes to look at again."""
        self.report.applied[rule.name] += 1
        self.report.matched.append(found.root.name)
        inputs = {n: None for m in found.nodes for n in m.all_input_nodes}
        stamp = "/".join(filter(None, (current_pass(), rule.name)))
        with editing(stamp, self.fuel), _created(self.gm) as created:
            rule.rewrite(self.gm, found)
        for node in found.nodes:  # the root comes first, so each is dead by the time it is looked at
            if not node._erased and not node.users and not node.is_impure():
                self.gm.graph.erase_node(node)
        alive = [n for n in (*created, *found.nodes) if not n._erased]
        before = max((self.trails[n] for n in found.nodes if n in self.trails), key=lambda t: t.length, default=None)
        trail = _Trail(rule.name, before, before.length + 1 if before else 1)
        if trail.length > self.limit:
            raise _unsettled(trail.names(), f"{trail.length} rewrites in a row at {found.root.name}")
        for node in alive:
            self.trails[node] = trail
        return self.affected(alive, inputs)

    def affected(self, changed: list[fx.Node], inputs: dict[fx.Node, None]) -> list[fx.Node]:
        """Roots whose match may have changed: what is new, its users up to the depth of the patterns, and users of an
        input that now has one user only."""
        found = dict.fromkeys(changed)
        edge = list(changed)
        for _ in range(self.depth):
            edge = [u for n in edge if len(n.users) <= 8 for u in n.users if u not in found]
            found.update(dict.fromkeys(edge))
        for node in inputs:
            if not node._erased and len(node.users) == 1:
                found.update(dict.fromkeys(node.users))
        return [n for n in found if self.rules_for(n)]


@contextlib.contextmanager
def _created(gm: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Collects the nodes made in the block."""
    graph, nodes = gm.graph, []
    outer = graph.__dict__.get("create_node")  # a rewrite may itself apply rules
    plain = graph.create_node

    def create_node(*args: Any, **kwargs: Any) -> fx.Node:
        node = plain(*args, **kwargs)
        nodes.append(node)
        return node

    graph.create_node = create_node  # type: ignore[method-assign]
    try:
        yield nodes
    finally:
        del graph.create_node
        if outer is not None:
            graph.create_node = outer  # type: ignore[method-assign]
