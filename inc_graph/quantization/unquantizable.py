"""A local setting that names, by its whole path, a module in which there is nothing that it could quantize."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from inc_graph.errors import ConfigError
from inc_graph.graph import module_path, module_type
from inc_graph.oppattern import operator_name, pattern_of
from inc_graph.quantization.leaf import is_layer
from inc_graph.recipe import Recipe

__all__ = ["refuse_in_graph", "refuse_in_modules"]


def refuse_in_modules(model: nn.Module, recipe: Recipe) -> None:
    """ConfigError for a rule of a weight-only method that names a module without layers, such as a norm."""
    kinds = {path: type(m).__name__ for path, m in model.named_modules(remove_duplicate=False)}
    _refuse(recipe, kinds, [p for p, m in model.named_modules(remove_duplicate=False) if is_layer(m)])


def refuse_in_graph(gm: fx.GraphModule, recipe: Recipe) -> None:
    """The same for the modules that a graph was made of, and their operators."""
    kinds: dict[str, str] = {}
    weighted = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or not (path := module_path(node)):
            continue
        kinds.setdefault(path, (module_type(node) or "module").rpartition(".")[2])
        if (pattern := pattern_of(node)) is not None and pattern.weight is not None:
            weighted += [path, operator_name(node, pattern)]
    _refuse(recipe, kinds, weighted)


def _refuse(recipe: Recipe, kinds: dict[str, str], weighted: Iterable[str]) -> None:
    for rule in recipe.rules:
        name, what = rule.where.value, rule.what
        if rule.where.kind != "name" or what is None or what.activation is not None or not name:
            continue
        if not rule.origin.startswith("set_local(") or name not in kinds:
            continue
        if any(p == name or p.startswith(f"{name}.") for p in weighted):
            continue
        hint = "take it out of set_local, or leave it float with dtype='fp32'"
        raise ConfigError(f"a {kinds[name]} has no weight that could be quantized", module=name, hint=hint)
