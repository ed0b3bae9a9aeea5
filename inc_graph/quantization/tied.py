"""Weights that several layers share: an output head that is tied to the embedding, say.

Quantizing one of them is a copy on write. The others keep the float table, and the report says so: both are in memory
then. Layers that end up with the same codes, or the same weight in half precision, share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from inc_graph.graph import get_attr, inc_meta, module_path, peek_meta, storage_key
from inc_graph.oppattern import argument, pattern_of
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.model import QuantizedModel
from inc_graph.quantization.streaming import source_of

__all__ = ["keep_unpacked", "share_codes", "tied_in_graph", "tied_layers"]

Owners = list[tuple[str, nn.Module]]
"""(path, module) of all that have one parameter."""


def keep_unpacked(tied: Iterable[Owners]) -> None:
    """Note on layers that are to share a weight in half precision that it is shared: each is lowered by itself, and a
    kernel's own layout of the weight would be a second copy of it.

    Args:
        tied: From `tied_layers`, before the first leaf was converted.
    """
    for owners in tied:
        halves: dict[str, list[fx.Node]] = {}
        for _, leaf in owners:
            inner = leaf.inner if isinstance(leaf, Leaf) and leaf.reason is None else None
            for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
                if (half := peek_meta(node).get("half")) is not None and pattern_of(node) is not None:
                    halves.setdefault(half, []).append(node)
        for node in (n for nodes in halves.values() if len(nodes) > 1 for n in nodes):
            inc_meta(node)["shared"] = True


def share_codes(tied: Iterable[Owners], new: Mapping[Leaf, nn.Module]) -> list[str]:
    """Let converted layers with one weight share their codes. What the report is to say of the other tied layers.

    Args:
        tied: From `tied_layers`, before the first leaf was converted.
        new: Leaf -> what takes its place, a converted leaf or the float layer.
    """
    notes = []
    for owners in tied:
        done = [(path, leaf, new[leaf]) for path, leaf in owners if isinstance(leaf, Leaf) and leaf in new]
        done = [(path, leaf, made) for path, leaf, made in done if isinstance(made, Leaf)]
        kept = [path for path, owner in owners if not any(owner is leaf for _, leaf, _ in done)]
        first: list[tuple[str, QuantizedModel]] = []
        for path, _, made in done:
            inner = made.inner
            assert isinstance(inner, QuantizedModel)
            if not any(inner.share(other) for _, other in first):
                first.append((path, inner))
        quantized = [path for path, _, _ in done]
        if quantized and kept:
            notes.append(_note(quantized, kept))
        elif len(first) > 1:
            notes.append(
                f"{' and '.join(p for p, _ in first)} share one weight: quantized differently, it is kept twice"
            )
    return notes


def tied_in_graph(gm: fx.GraphModule) -> list[str]:
    """The same notes for an annotated graph, whose layers with one weight and one format always share their codes; what
    else reads a weight is named, too."""
    readers: dict[object, tuple[dict[str, None], dict[str, None]]] = {}
    for node in gm.graph.nodes:
        pattern = pattern_of(node)
        weight = argument(node, pattern.weight) if pattern is not None and pattern.weight is not None else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        tensor = get_attr(gm, str(weight.target))
        if isinstance(tensor, Tensor):
            quantized, kept = readers.setdefault(storage_key(tensor), ({}, {}))
            (quantized if "weight" in peek_meta(node) else kept)[module_path(node) or node.name] = None
    for read in gm.graph.find_nodes(op="get_attr"):
        tensor = get_attr(gm, str(read.target))
        if isinstance(tensor, Tensor) and (found := readers.get(storage_key(tensor))) is not None:
            found[1].update({user.name: None for user in read.users if not _is_weight_of(read, user)})
    return [_note(list(quantized), list(kept)) for quantized, kept in readers.values() if quantized and kept]


def _is_weight_of(read: fx.Node, user: fx.Node) -> bool:
    pattern = pattern_of(user)
    return pattern is not None and pattern.weight is not None and argument(user, pattern.weight) is read


def _note(quantized: list[str], kept: list[str]) -> str:
    return (
        f"{', '.join(quantized)} shared its weight with {', '.join(kept)}, which stays float: "
        "the float table is kept beside the codes"
    )


def tied_layers(model: nn.Module) -> list[Owners]:
    """Of a prepared model: the modules that have one parameter, for each that several have."""
    owners: dict[Any, dict[nn.Module, str]] = {}
    sources = [source_of(m) for m in model.modules() if isinstance(m, Leaf)]
    source = next((s for s in sources if s is not None), None)
    within = tuple(
        f"{path}." for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Leaf) and path
    )
    for path, module in model.named_modules():
        if path.startswith(within):
            continue
        layer = module.original if isinstance(module, Leaf) else module
        for parameter in layer._parameters.values() if layer is not None else ():
            if parameter is not None:
                name = None if source is None else source.name_of(parameter)  # one tensor of a file is several here
                owners.setdefault(name or id(parameter), {}).setdefault(module, path)
    several = [found for found in owners.values() if len(found) > 1 and any(isinstance(m, Leaf) for m in found)]
    return [[(path, module) for module, path in found.items()] for found in several]
