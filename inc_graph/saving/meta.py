"""What is noted of a graph as a whole: numbers that JSON has not, and whether it is of the form that is read."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from inc_graph.errors import SavedModelError
from inc_graph.recipe import Recipe

__all__ = ["check_meta", "finite", "infinite"]


def finite(data: Any) -> Any:
    """Infinite numbers and NaN as {"float": "inf"}."""
    if isinstance(data, float) and not math.isfinite(data):
        return {"float": str(data)}
    if isinstance(data, dict):
        return {k: finite(v) for k, v in data.items()}
    return [finite(v) for v in data] if isinstance(data, list) else data


def infinite(data: Any) -> Any:
    """Inverse of `finite`."""
    if isinstance(data, dict):
        if set(data) == {"float"} and data["float"] in ("inf", "-inf", "nan"):
            return float(data["float"])
        return {k: infinite(v) for k, v in data.items()}
    return [infinite(v) for v in data] if isinstance(data, list) else data


def check_meta(meta: dict[str, Any], graph: fx.Graph) -> None:
    """Refuse a recipe or a description of the inputs that would fail later, when it is used.

    Raises:
        SavedModelError, ConfigError, SpecError: a field is not of its form.
    """
    if "recipe" in meta:
        Recipe.from_json(meta["recipe"])
    if "names" in meta and not (isinstance(meta["names"], dict) and all(map(_count, meta["names"].values()))):
        raise SavedModelError("field 'names' of the notes on the graph cannot be read")
    if "inputs" not in meta:
        return
    inputs = meta["inputs"]
    good = isinstance(inputs, dict) and set(inputs) == {"leaves", "ranges", "optional"}
    good = good and isinstance(inputs["leaves"], list) and all(map(_leaf, inputs["leaves"]))
    good = good and isinstance(inputs["ranges"], dict) and all(map(_range, inputs["ranges"].values()))
    good = good and isinstance(inputs["optional"], list) and all(isinstance(n, str) for n in inputs["optional"])
    if not good or len(inputs["leaves"]) != sum(n.op == "placeholder" for n in graph.nodes):
        raise SavedModelError("the description of the inputs cannot be read")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _leaf(leaf: Any) -> bool:
    if not isinstance(leaf, dict) or not isinstance(leaf.get("name"), str):
        return False
    if not set(leaf) <= {"name", "shape", "form", "contiguous", "value"}:
        return False
    if "shape" in leaf:
        sizes = leaf["shape"]
        if not isinstance(sizes, list) or not all(isinstance(d, str) or _count(d) for d in sizes):
            return False
        if not isinstance(leaf.get("form"), str):
            return False
    return "value" not in leaf or leaf["value"] is None or isinstance(leaf["value"], int | float | str | bool)


def _range(ends: Any) -> bool:
    return isinstance(ends, list) and len(ends) == 2 and all(e is None or _count(e) for e in ends)
