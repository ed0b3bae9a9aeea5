"""Memory layouts after lowering: int8 convolutions write channels last, the float graph may have said otherwise.

Most operators do not care. Three kinds of reader do, and get what they were promised:
* `view` becomes `reshape`, which copies where a view is no longer possible;
* operators that read memory by position (`as_strided`, a bit cast), and operators that torch does not know (they may
  rely on the layout they were traced with), get the layout restored right behind the layers they depend on;
* outputs of the graph have the strides that the float model's outputs have.
Shapes of everything else are propagated anew, so that `meta["val"]` keeps telling the truth.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from inc_graph.graph import fake_call, insert_call, val
from inc_graph.lowering import _dynamic, _half, _onednn
from inc_graph.lowering._context import OneDnnContext, size_hint
from inc_graph.ops import is_inc

__all__ = ["settle_layouts"]

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_LAYERS = (
    _onednn.int8_layer, _onednn.int8_layer_add, _onednn.int8_layer_sum, _dynamic.dynamic_codes, _dynamic.dynamic_layer,
    _dynamic.dynamic_layer_add, _dynamic.dynamic_layer_codes, _half.half_layer, _half.half_layer_add,
)  # fmt: skip
_BY_POSITION = (
    aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default, aten.view.dtype,
    aten.view_as_complex.default, aten.set_.source_Tensor,
)  # fmt: skip


def settle_layouts(c: OneDnnContext) -> None:
    """Make the graph right for the layouts that the layers really write. Linear in the size of the graph."""
    moved = {n: p for n, p in c.promised.items() if not n._erased and _layout(val(n)) != _layout(p)}
    if not moved:
        return
    touched = _below(c.gm.graph, moved)
    roots: dict[fx.Node, None] = {}
    for node in touched:
        if node.op == "call_function" and _reads_by_position(node):
            roots.update(dict.fromkeys(_origins(node, moved)))
    for root in roots:
        _restore(c, root, moved[root], list(root.users))
    touched = _below(c.gm.graph, [n for n in moved if n not in roots])
    old = {n: val(n) for n in touched}
    for node in touched:
        if node.op == "output":
            for value in node.all_input_nodes:
                promise = moved.get(value, old.get(value))
                if isinstance(promise, torch.Tensor) and _layout(val(value)) != _layout(promise):
                    _restore(c, value, promise, [node])
        elif node.op == "call_function" and not _is_layer(node):
            if node.target in _VIEWS:
                node.target = aten.reshape.default
            node.meta["val"] = fake_call(c.gm, node.target, node.args, node.kwargs)  # type: ignore[arg-type]


def _is_layer(node: fx.Node) -> bool:
    """True for what gives the same layout whatever it gets."""
    return node.target in _LAYERS


def _below(graph: fx.Graph, roots: Any) -> list[fx.Node]:
    """Nodes that depend on `roots`, without these, in graph order."""
    seen, found = set(roots), []
    for node in graph.nodes:
        if node not in seen and any(i in seen for i in node.all_input_nodes):
            seen.add(node)
            found.append(node)
    return found


def _reads_by_position(node: fx.Node) -> bool:
    namespace = getattr(node.target, "namespace", None)
    if node.target in _BY_POSITION:
        return True
    if namespace == "aten" or is_inc(node) or node.target is operator.getitem:
        return False
    return not getattr(node.target, "__module__", "").startswith("inc_graph.lowering")


def _origins(node: fx.Node, moved: dict[fx.Node, torch.Tensor]) -> list[fx.Node]:
    """The nearest moved values above `node`."""
    found, seen, todo = [], {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            if source in moved:
                found.append(source)
            elif not _is_layer(source):
                todo.append(source)
    return found


def _restore(c: OneDnnContext, node: fx.Node, promise: torch.Tensor, users: list[fx.Node]) -> None:
    """Give `users` the value of `node` in the layout of `promise`, if that has no holes; no copy where it has it."""
    order = sorted(range(promise.ndim), key=lambda d: -size_hint(promise.stride(d)))
    if not _dense(promise, order):
        return
    value = node
    back = [order.index(d) for d in range(promise.ndim)]
    steps: list[tuple[Any, tuple[Any, ...]]] = [(aten.contiguous.default, ())]
    if order != sorted(order):
        steps = [(aten.permute.default, (order,)), *steps, (aten.permute.default, (back,))]
    for target, args in steps:
        value = insert_call(c.gm, target, (value, *args), after=value, like=node)
    for user in users:
        user.replace_input_with(node, value)


def _dense(x: torch.Tensor, order: list[int]) -> bool:
    expected = 1
    for d in reversed(order):
        size, stride = size_hint(x.shape[d]), size_hint(x.stride(d))
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _layout(x: Any) -> Any:
    """Strides as text (symbols are not compared, which would guard), without dimensions of one entry."""
    if not isinstance(x, torch.Tensor):
        return None
    return [str(s) for n, s in zip(x.shape, x.stride(), strict=True) if not (isinstance(n, int) and n == 1)]
