"""Parts of a graph that run as one call: which nodes belong together, and putting the call in their place.

Nodes that can be in a part get the number of the first part they can be in: that of what they read, or one more where
something in between cannot be in any. So the graph falls into as few parts as its data flow allows, whatever the order
of the nodes. What has effects (a write to a buffer) keeps its place among the others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from inc_graph.graph import insert_call, val

__all__ = ["borders", "parts", "replace_part"]


def parts(graph: fx.Graph, fits: Callable[[fx.Node], bool], constant: Callable[[fx.Node], bool]) -> list[list[fx.Node]]:
    """The parts, each in graph order; the graph is put in an order in which each of them stands together.

    Args:
        fits: Whether a node can be in a part.
        constant: Whether each part has a value for itself: such nodes are in none.
    """
    phase: dict[fx.Node, int] = {}  # even: of a part; odd: what comes after that part
    found: dict[int, list[fx.Node]] = {}
    floor, last = 0, -1
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or constant(node):
            phase[node] = -1
            continue
        before = max((phase[i] for i in node.all_input_nodes), default=-1)
        if node.op == "output":
            continue
        if node.target is operator.getitem:  # stays with what it is an item of
            phase[node] = before
            if before % 2 == 0:
                found[before].append(node)
        elif fits(node):
            phase[node] = max(before + before % 2, floor)
            found.setdefault(phase[node], []).append(node)
        else:
            phase[node] = max(before + 1 - before % 2, floor - 1)
            if node.is_impure():
                phase[node] = max(phase[node], last + 1 - last % 2)
                floor = phase[node] + 1
        last = max(last, phase[node])
    for node in sorted(phase, key=phase.__getitem__):  # stable: what belongs to one phase keeps its order
        graph.output_node().prepend(node)
    return [found[k] for k in sorted(found)]


def borders(part: list[fx.Node], constant: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], list[fx.Node]]:
    """(inputs, outputs) of a part: what it reads from outside, constants left out, and what is read outside of it."""
    inside = set(part)
    sources = dict.fromkeys(i for n in part for i in n.all_input_nodes if i not in inside and not constant(i))
    return list(sources), [n for n in part if any(u not in inside for u in n.users)]


def replace_part(
    gm: fx.GraphModule, part: list[fx.Node], outputs: list[fx.Node], target: Callable[..., Any], args: tuple[Any, ...]
) -> fx.Node:
    """Put `target(*args)`, which gives a list of the values of `outputs`, in the place of a part's nodes."""
    inside = set(part)
    with gm.graph.inserting_after(part[-1]):
        call = gm.graph.create_node("call_function", target, args, {})
    call.meta = {k: v for k, v in part[0].meta.items() if k in ("nn_module_stack", "stack_trace")}
    call.meta["val"] = [val(n) for n in outputs]
    after = call
    for i, node in enumerate(outputs):
        after = insert_call(gm, operator.getitem, (call, i), after=after, like=node)
        node.replace_all_uses_with(after, delete_user_cb=lambda user: user not in inside)
    for node in reversed(part):
        gm.graph.erase_node(node)
    return call
