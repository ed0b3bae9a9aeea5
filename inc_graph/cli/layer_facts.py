"""What a Q-DQ graph says of each of its operators: rule, formats, ranges of scales, the passes that made it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inc_graph.graph import get_attr, module_path, peek_meta, shape
from inc_graph.oppattern import argument, pattern_of
from inc_graph.ops import is_dequantize, is_quantize
from inc_graph.recipe import Recipe

__all__ = ["operators_in"]


def operators_in(gm: fx.GraphModule, recipe: Recipe, paths: list[str]) -> Iterator[dict[str, Any]]:
    """What is known of each operator that a pattern describes.

    Args:
        gm: A Q-DQ graph.
        recipe: That it was made with.
        paths: Where the graph stands in the model, if it is one of its layers; [""] if it is the model.
    """
    for node in gm.graph.nodes:
        pattern = pattern_of(node)
        if pattern is None:
            continue
        notes = peek_meta(node)
        number = notes.get("rule")
        rule = None
        if isinstance(number, int) and 0 <= number < len(recipe.rules) and "op" in notes:
            rule = f"{number}. {recipe.rules[number]}"
        yield {
            "name": node.name,
            "modules": [p for p in paths if p] or [p for p in [module_path(node)] if p],
            "op": notes.get("op") or pattern.name,
            "rule": rule,
            "float": notes.get("float"),
            "values": list(_values(gm, node, pattern.weight)),
            "provenance": notes.get("provenance", []),
        }


def _values(gm: fx.GraphModule, node: fx.Node, weight: int | None) -> Iterator[dict[str, Any]]:
    """The quantized values that an operator reads, and gives."""
    weights = argument(node, weight) if weight is not None else None
    for read in node.all_input_nodes:
        if is_dequantize(read):
            yield _value(gm, "weight" if read is weights else "input", read)
    for user in _behind(node):
        if is_quantize(user):
            yield _value(gm, "output", user)


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value; an activation function is part of the operator before it."""
    for user in node.users:
        pattern = pattern_of(user)
        if pattern is not None and pattern.role == "activation":
            yield from _behind(user)
        else:
            yield user


def _value(gm: fx.GraphModule, role: str, node: fx.Node) -> dict[str, Any]:
    """Of a quantize or dequantize node."""
    codes, scale, zero_point, block, qtype = (argument(node, i) for i in range(5))
    source, stored = codes, None  # the float value, or the attribute that holds the codes
    while is_dequantize(node) and source.op == "call_function" and source.all_input_nodes:
        made_here = is_quantize(source)
        source = source.all_input_nodes[0]  # views of codes, and unpacking
        if made_here:
            break
    if source.op == "get_attr" and isinstance(value := get_attr(gm, str(source.target)), torch.Tensor):
        stored = value.nbytes
    return {
        "role": role,
        "qtype": qtype,
        "shape": _sizes(shape(node)),
        "block": _sizes(block),
        "source": f"@{source.target}" if source.op == "get_attr" else source.name,
        "scale": _range(gm, scale),
        "zero_point": _range(gm, zero_point),
        "stored_bytes": stored,
        "provenance": peek_meta(node).get("provenance", []),
    }


def _sizes(values: Any) -> list[Any]:
    return [v if isinstance(v, int) else str(v) for v in values or ()]


def _range(gm: fx.GraphModule, node: Any) -> dict[str, Any] | None:
    """Shape, minimum and maximum of a constant; None for what is computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    tensor = get_attr(gm, str(node.target))
    if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
        return None
    return {"shape": list(tensor.shape), "min": float(tensor.min()), "max": float(tensor.max())}
