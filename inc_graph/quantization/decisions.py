"""The recipe as it was applied: for every operator which rule of the config gave it which method."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from inc_graph.errors import ConfigError
from inc_graph.graph import module_path, peek_meta
from inc_graph.oppattern import pattern_of
from inc_graph.recipe import OpQuant, Recipe, get_recipe
from inc_graph.report import read_graph, type_of
from inc_graph.tables import printed

__all__ = ["Decision", "Decisions", "decisions_of"]


@dataclass(frozen=True)
class Decision:
    """What was decided for one operator.

    Attributes:
        name, module, op: Graph name, module path, operator type.
        rule: Index of the rule in the recipe; None if none speaks of it.
        origin: That rule in the words of the user.
        method: What the operator got; "float: " and the reason if it stayed float.
    """

    name: str
    module: str
    op: str
    rule: int | None
    origin: str
    method: str


@dataclass
class Decisions:
    """For every operator which rule gave it which method; prints as a table."""

    recipes: list[Recipe] = field(default_factory=list)
    lines: list[Decision] = field(default_factory=list)

    def __add__(self, other: Decisions) -> Decisions:
        return Decisions(
            [*self.recipes, *(r for r in other.recipes if r not in self.recipes)], self.lines + other.lines
        )

    def __str__(self) -> str:
        return printed(self)

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        title = ", ".join(dict.fromkeys(f"{r.method} for {r.backend}" for r in self.recipes))
        table = Table(title=title or "no recipe", title_justify="left")
        for name in ("operator", "type", "rule", "method"):
            table.add_column(name, overflow="fold")
        for x in self.lines:
            table.add_row(*map(Text, (x.module or x.name, x.op, x.origin, x.method)))
        return table


def decisions_of(model: nn.Module) -> Decisions:
    """The decisions of a prepared or a converted model, as a whole or layer by layer.

    What passes values on (views) has no line, nor what is no part of the layers that are quantized layer by layer.

    Raises:
        ConfigError: the model carries no recipe.
    """
    known = [own for m in model.modules() if isinstance(own := getattr(m, "recipe", None), Decisions)]
    graphs = [m for m in model.modules() if isinstance(m, fx.GraphModule) and "recipe" in m.meta.get("inc", {})]
    found = known or [_decided(gm) for gm in graphs]
    if not found:
        raise ConfigError("this model carries no recipe", hint="run inc_graph.quantization.prepare on it")
    return functools.reduce(Decisions.__add__, found)


def _decided(gm: fx.GraphModule) -> Decisions:
    recipe = get_recipe(gm)
    reasons = {line.name: f"float: {line.detail}" for line in read_graph(gm)[1]}
    lines = []
    for node in gm.graph.nodes:
        notes, pattern = peek_meta(node), pattern_of(node)
        if node.name not in reasons and not ("op" in notes and "rule" in notes):
            continue  # operators that follow their neighbours into half precision go by no rule
        index = notes.get("rule")
        if node.name in reasons:
            found = None if pattern is None or pattern.role == "activation" else recipe.resolve(node, pattern)
            index = None if found is None else found[0]
        rule = recipe.rules[index] if isinstance(index, int) and 0 <= index < len(recipe.rules) else None
        origin = "no rule" if rule is None else rule.origin or f"{recipe.method}, everything"
        method = reasons.get(node.name) or _method(rule.what if rule else None, "weight" in notes)
        op = notes.get("op") or type_of(node)
        lines.append(Decision(node.name, module_path(node), op, index, origin, method))
    return Decisions([recipe], lines)


def _method(what: OpQuant | None, weighted: bool) -> str:
    if what is None:
        return "?"
    if what.half is not None:
        return what.half
    parts = [f"activation {what.activation} ({what.act_algorithm})"] if what.activation else []
    parts += [f"weight {what.weight} ({what.weight_algorithm})"] if what.weight and weighted else []
    return ", ".join(parts)
