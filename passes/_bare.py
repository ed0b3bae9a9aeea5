"""Back from an observed graph: without the observers, and without what `annotate` has decided."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from inc_graph.graph import erase_dead, get_attr, peek_meta, replace_uses

__all__ = ["forget_decisions", "remove_observers"]

_KEPT = ("provenance", "was")


def remove_observers(gm: fx.GraphModule, kinds: Collection[type[nn.Module]] = (nn.Module,)) -> None:
    """Remove the calls of observers of these classes, and the observers."""
    found = [n for n in gm.graph.find_nodes(op="call_module") if isinstance(get_attr(gm, str(n.target)), tuple(kinds))]
    for node in found:
        source: Any = node.args[0]
        replace_uses(node, source)
        gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        weight = peek_meta(node).get("weight", {})
        for key in ("mean", "gram"):  # names of observers
            weight.pop(key, None)
    if found:
        erase_dead(gm)


def forget_decisions(gm: fx.GraphModule) -> None:
    """Take the annotations of `annotate` and of passes behind it off."""
    for node in gm.graph.nodes:
        notes = peek_meta(node)
        for key in [k for k in notes if k not in _KEPT]:
            del notes[key]
