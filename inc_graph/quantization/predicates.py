"""Predicates of local settings: asked once, when a model is prepared; the recipe keeps what they took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from inc_graph.graph import module_type, val
from inc_graph.oppattern import OperatorInfo, argument, pattern_of
from inc_graph.quantization.leaf import is_layer, is_recurrent
from inc_graph.quantization.mapping import info_of
from inc_graph.quantization.where import asked
from inc_graph.recipe import Recipe, operator_name

__all__ = ["bind_predicates", "layers_of", "operators_of"]


def operators_of(gm: fx.GraphModule) -> list[OperatorInfo]:
    """Every operator of a graph that a setting can speak of."""
    found = []
    for node in gm.graph.nodes:
        if (pattern := pattern_of(node)) is None:
            continue
        weight = argument(node, pattern.weight) if pattern.weight is not None else None
        shape = getattr(val(weight), "shape", None) if isinstance(weight, fx.Node) else None
        sizes = None if shape is None else tuple(int(d) for d in shape if isinstance(d, int))
        kind = (module_type(node) or "").rpartition(".")[2]
        found.append(OperatorInfo(operator_name(node, pattern), pattern.name, kind, sizes))
    return found


def layers_of(model: nn.Module) -> list[OperatorInfo]:
    """Every layer of a module that is quantized layer by layer."""
    return [
        info_of(path, m) for path, m in model.named_modules(remove_duplicate=False) if is_layer(m) or is_recurrent(m)
    ]


def bind_predicates(recipe: Recipe, predicates: Mapping[int, Any], operators: Iterable[OperatorInfo]) -> Recipe:
    """The recipe with the members of its predicates filled in.

    Args:
        recipe: Of a config.
        predicates: Of the same config: index of the rule -> predicate.
        operators: What they are asked about.

    Raises:
        ConfigError: a predicate fails; names it and the operator.
    """
    if not predicates:
        return recipe
    known = list(operators)
    rules = list(recipe.rules)
    for index, predicate in predicates.items():
        members = tuple(dict.fromkeys(o.name for o in known if asked(predicate, o)))
        rules[index] = replace(rules[index], where=replace(rules[index].where, members=members))
    return replace(recipe, rules=tuple(rules))
