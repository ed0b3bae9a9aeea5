"""Weights that a weight-only method leaves float though nobody has asked for that: most of a model may be none of its
layers (experts that are one parameter), or layers of a kind that it takes only where they are named."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from inc_graph.errors import IncWarning
from inc_graph.graph import get_attr, module_type, peek_meta
from inc_graph.oppattern import argument, pattern_of
from inc_graph.quantization.layers import tensors_of
from inc_graph.quantization.leaf import Leaf, is_layer
from inc_graph.recipe import Recipe
from inc_graph.report import OpLine, Report

__all__ = ["LeftFloat", "left_in_graph", "left_in_modules", "warn_of_left"]

_ASKED = "kept float by"  # how a report says that a rule of the config has left an operator float
_SHARE = 0.5


@dataclass
class LeftFloat:
    """Bytes of the float model's parameters of two and more dimensions, without tables.

    Attributes:
        total: Of all of them.
        layers: Kind -> bytes, of layers that nobody has asked to leave float.
        others: Kind -> bytes, of parameters that are the weight of no layer.
    """

    total: int = 0
    layers: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


def left_in_modules(model: nn.Module, found: Mapping[Leaf, list[str]], floats: Iterable[OpLine]) -> LeftFloat:
    """What is left in a model prepared layer by layer, whose leaves are `found`."""
    left = LeftFloat()
    why = {line.module: line.detail for line in floats}
    for leaf in found:
        assert leaf.original is not None  # it is prepared, not loaded
        left.total += sum(int(p.nbytes) for p in leaf.original.parameters() if _counts(p))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    seen = set(tables)
    for path, owner, name, tensor in tensors_of(model, [path for paths in found.values() for path in paths]):
        if name not in owner._parameters or id(tensor) in seen or not _counts(tensor):
            continue
        seen.add(id(tensor))
        left.total += tensor.nbytes
        if not is_layer(owner):
            left.others[type(owner).__name__] += tensor.nbytes
        elif not why.get(path.rpartition(".")[0], "").startswith(_ASKED):
            left.layers[type(owner).__name__] += tensor.nbytes
    return left


def left_in_graph(gm: fx.GraphModule, floats: Iterable[OpLine]) -> LeftFloat:
    """What is left in an observed graph."""
    left = LeftFloat()
    why = {line.name: line.detail for line in floats}
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = get_attr(gm, str(node.target))  # of control flow a graph
        if not isinstance(tensor, nn.Parameter) or not _counts(tensor) or not node.users:
            continue
        layers = [user for user in node.users if _reads_weight(user, node)]
        if any(str(user.target).startswith("aten.embedding") for user in node.users):
            continue
        left.total += tensor.nbytes
        if not layers:
            user = next(iter(node.users))
            left.others[(module_type(user) or "the model").rpartition(".")[2]] += tensor.nbytes
        elif not any("weight" in peek_meta(n) or why.get(n.name, "").startswith(_ASKED) for n in layers):
            left.layers[(module_type(layers[0]) or str(layers[0].target)).rpartition(".")[2]] += tensor.nbytes
    return left


def warn_of_left(left: LeftFloat, recipe: Recipe, report: Report) -> None:
    """IncWarning and a note if that is most of a model that a weight-only method was to quantize as a whole."""
    what = [rule.what for rule in recipe.rules if rule.what is not None]
    weight_only = any(w.weight is not None for w in what) and all(w.activation is None and w.half is None for w in what)
    if not weight_only or any(rule.where.kind == "all" and rule.what is None for rule in recipe.rules):
        return
    count = left.layers.total() + left.others.total()
    if count <= _SHARE * left.total:
        return
    parts, hints = [], []
    if left.others:
        parts.append(f"parameters that are no layers ({_listed(left.others)})")
        hints.append(
            "methods take layers: where experts are one parameter, a Linear for each expert would be quantized"
        )
    if left.layers:
        parts.append(f"layers of kinds that are not taken unless they are named ({_listed(left.layers)})")
        hints.append(
            "set_local(kind, config) takes layers of that kind, where the method has a way to; see report.floats"
        )
    text = (
        f"{100 * count / left.total:.1f} % of the bytes of all weights stay float (tables not counted), in"
        f" {' and in '.join(parts)}"
    )
    report.notes.append(text)
    warnings.warn(f"{text}; {'; '.join(hints)}", IncWarning, stacklevel=4)


def _counts(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.is_floating_point()


def _reads_weight(user: fx.Node, node: fx.Node) -> bool:
    pattern = pattern_of(user)
    return pattern is not None and pattern.weight is not None and argument(user, pattern.weight) is node


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind}: {count / 1e6:.3g} MB" for kind, count in kinds.most_common(3))
