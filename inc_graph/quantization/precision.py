"""A recipe with half precision in it, as the machine can carry it out."""

from __future__ import annotations

import warnings
from dataclasses import replace

from inc_graph.errors import PrecisionWarning
from inc_graph.passmanager import Pipeline
from inc_graph.recipe import Recipe, WhereRule
from inc_graph.registry import PASSES
from inc_graph.utils.precision import forced, why_slow

__all__ = ["all_float", "fit_precision", "nothing_done"]

_PASS = "mixed-precision"


def fit_precision(recipe: Recipe, device: str) -> Recipe:
    """The recipe with float32 in the place of formats that a device of this kind lacks, which a warning names.

    What a local setting gives half precision gets it in the pipelines of any method: the pass runs as the last.
    """
    asked = {rule.what.half for rule in recipe.rules if rule.what is not None and rule.what.half is not None}
    lacking = {name: why for name in sorted(asked) if (why := why_slow(name, device)) and not forced(name)}
    for name, why in lacking.items():
        hint = f"FORCE_{name.upper()}=1 in the environment converts all the same"
        warnings.warn(f"float32 is used in the place of {name}: {why}; {hint}", PrecisionWarning, stacklevel=4)
    rules = tuple(_fitted(rule, lacking) for rule in recipe.rules)
    if not asked and _PASS not in recipe.convert:
        return recipe
    passes = [p for p in Pipeline.parse(recipe.convert).passes if p.name != _PASS]
    if any(rule.half is not None for rule in rules):
        passes.append(PASSES.get(_PASS)())
    return replace(recipe, rules=rules, convert=str(Pipeline(passes)))


def _fitted(rule: WhereRule, lacking: dict[str, str]) -> WhereRule:
    if rule.what is None or rule.what.half not in lacking:
        return rule
    return replace(rule, what=None, origin=rule.origin or f"the lack of instructions for {rule.what.half}")


def nothing_done(recipe: Recipe) -> str:
    """What an error says of a model in which the recipe finds nothing."""
    done = "compute in half precision" if recipe.method == "mixed_precision" else "be quantized"
    return f"nothing in this model can {done}"


def all_float(recipe: Recipe) -> bool:
    """Whether a recipe of mixed precision leaves all of the model float32: as asked for, or as the machine is."""
    return recipe.method == "mixed_precision" and all(rule.floats for rule in recipe.rules)
