"""Dynamic layers that read the same codes become one, whose result is read through slices: q, k and v of attention.

A kernel of a few hundred columns is too short for its own beginning and end, and each product costs a call and a pass
behind it. A slice of the last dimension has longer steps between rows than a result of its own would have. So layers
are joined only if all that becomes of them up to `attention` or `matmul`, which take any steps, are splits of the last
dimension and permutations. Rows of a weight are quantized one by one, so that nothing is rounded otherwise.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from inc_graph.graph import fake_call, insert_call, replace_uses, unique_name, val
from inc_graph.lowering._attention import attention
from inc_graph.lowering._context import OneDnnContext, typical_shape
from inc_graph.lowering._dynamic import DynamicLayer, dynamic_layer
from inc_graph.lowering._onednn import PackedLayer
from inc_graph.lowering._packed import PackedWeight

__all__ = ["join_layers"]

aten = torch.ops.aten

_SPLITS = (aten.view.default, aten.reshape.default, aten.unflatten.int)
_PERMUTATIONS = (aten.transpose.int, aten.permute.default)
_ANY_STEPS = (attention, aten.matmul.default)


def join_layers(c: OneDnnContext) -> None:
    """Join what can be, in a graph whose layers are lowered."""
    groups: dict[Any, list[fx.Node]] = {}
    readers = Counter(id(x.weight) for x in vars(c.gm).values() if isinstance(x, PackedLayer))  # of a weight
    for node in c.gm.graph.find_nodes(op="call_function", target=dynamic_layer):
        layer = getattr(c.gm, node.args[2].target)
        if readers[id(layer.weight)] == 1 and _splits(node):
            key = (*node.args[:2], layer.activation, layer.dtype, layer.zero_point)
            groups.setdefault(key, []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _join(c, nodes)


def _splits(node: fx.Node) -> bool:
    """Whether all readers split the last dimension, and what is permuted then is read with any steps."""
    return bool(node.users) and all(
        user.target in _SPLITS and _only_last(val(node), val(user)) and _any_steps(user) for user in node.users
    )


def _only_last(before: Any, after: Any) -> bool:
    lead = before.dim() - 1
    same = list(map(str, before.shape[:lead])) == list(map(str, after.shape[:lead]))  # text: no guards
    rest = after.shape[lead:]
    return same and len(rest) > 0 and all(isinstance(d, int) for d in rest) and _product(rest) == before.shape[lead]


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _any_steps(node: fx.Node) -> bool:
    return bool(node.users) and all(
        user.target in _ANY_STEPS or (user.target in _PERMUTATIONS and _any_steps(user)) for user in node.users
    )


def _join(c: OneDnnContext, nodes: list[fx.Node]) -> None:
    gm, names = c.gm, [str(n.args[2].target) for n in nodes]  # type: ignore[union-attr]
    layers: list[DynamicLayer] = [getattr(gm, name) for name in names]
    first, node = layers[0], nodes[0]
    codes: Any = node.args[0]
    weight = PackedWeight(
        torch.cat([x.weight.codes() for x in layers]),
        torch.cat([x.weight.scale for x in layers]),
        typical_shape(codes),
    )
    sums = torch.cat([_or_zeros(x.weight_sums, x) for x in layers])
    bias = None if all(x.bias is None for x in layers) else torch.cat([_or_zeros(x.bias, x) for x in layers])
    joined = DynamicLayer(weight, sums, bias, first.zero_point, first.activation, first.dtype)
    name = unique_name(gm, f"joined_{names[0]}")
    setattr(gm, name, joined)
    with gm.graph.inserting_before(node):
        read = gm.graph.create_node("get_attr", name, (), {})
        call = gm.graph.create_node("call_function", dynamic_layer, (*node.args[:2], read), {})
    read.meta["val"] = None
    call.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    call.meta["val"] = joined.empty_out(*(val(n) for n in node.args[:2]))  # type: ignore[arg-type]
    begin, after, last = 0, call, val(node).dim() - 1
    for old, own, layer in zip(nodes, names, layers, strict=True):
        end = begin + layer.shape[0]
        after = piece = insert_call(gm, aten.slice.Tensor, (call, last, begin, end), after=after, like=old)
        replace_uses(old, piece)
        gm.graph.erase_node(old)
        _new_steps(gm, piece)
        attr = c.sources[own]
        c.packed[attr] = _rows(weight, begin, end)
        begin = end
    for name in names:
        for read in [n for n in gm.graph.find_nodes(op="get_attr") if n.target == name]:
            gm.graph.erase_node(read)
        delattr(gm, name)


def _or_zeros(x: torch.Tensor | None, layer: DynamicLayer) -> torch.Tensor:
    return torch.zeros(layer.shape[0]) if x is None else x


def _rows(weight: PackedWeight, begin: int, end: int) -> Any:
    return lambda: weight.codes()[begin:end].clone()


def _new_steps(gm: fx.GraphModule, node: fx.Node) -> None:
    """Values of the views behind a slice: their shapes are as before, their steps are not."""
    for user in node.users:
        if user.target in (*_SPLITS, *_PERMUTATIONS):
            user.meta["val"] = fake_call(gm, user.target, user.args, user.kwargs)  # type: ignore[arg-type]
            _new_steps(gm, user)
