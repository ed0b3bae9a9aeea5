"""One alpha for all layers of a block, by the error of what the block gives.

A block is a module with a number in its path (`layers.3`): the operators of that path, what they read from outside, and
what others read of them. It is computed in float, and with the inputs and weights of its layers scaled and rounded, on
some of the kept calls. Layers that stand in no block are judged each by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from inc_graph.channel_stats import Recalls
from inc_graph.graph import module_path
from inc_graph.passes._smooth_search import Judge, run_rounded
from inc_graph.passes._smooth_sites import Group, Site

__all__ = ["Block", "find_blocks", "some_calls"]

_BYTES = 1 << 28  # of what flows into all blocks, that is kept
_NUMBER = re.compile(r"(.*?\.)?\d+(?=\.|$)")


@dataclass(eq=False)
class Block:
    """Operators of a module, groups of its layers, and some of what flows into it.

    Called with an alpha (None: nothing is scaled) it gives the error of its results, relative to them.
    """

    groups: list[Group]
    judges: list[Judge]
    nodes: list[fx.Node]
    results: list[fx.Node]
    inputs: list[dict[fx.Node, Any]]

    def __call__(self, alpha: float | None) -> float:
        scales = {g: judge.scale(alpha) for g, judge in zip(self.groups, self.judges, strict=True)}
        owner: dict[fx.Node, tuple[Site, Tensor]] = {
            n: (s, scales[g]) for g in self.groups for s in g.sites for n in s.layers if n in self.nodes
        }
        weights: dict[fx.Node, Tensor] = {}
        error = power = 0.0
        for values in self.inputs:
            want = self._run(values, {}, weights)
            got = self._run(values, owner, weights)
            for a, b in zip(want, got, strict=True):
                error, power = error + float((a - b).square().sum()), power + float(a.square().sum())
        return error / power if power > 0 else 0.0

    def _run(
        self, values: dict[fx.Node, Any], rounded: dict[fx.Node, tuple[Site, Tensor]], weights: dict[fx.Node, Tensor]
    ) -> list[Tensor]:
        env = dict(values)
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            if node in rounded:
                env[node] = run_rounded(node, args, kwargs, *rounded[node], known=weights)
            else:
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [env[n].float() for n in self.results]


def find_blocks(gm: fx.GraphModule, groups: Sequence[Group], recalls: Recalls | None) -> list[Block]:
    """The blocks of groups that are to be judged so; none without calls. The graph is the bare float one."""
    members: dict[str, list[Group]] = {}
    for group in groups:
        keys = {_key(n) for s in group.sites for n in s.layers}
        how, key = group.sites[0].how, next(iter(keys))
        if how.auto and how.do_blockwise and len(keys) == 1 and key is not None and recalls is not None:
            members.setdefault(key, []).append(group)
    if not members or recalls is None:
        return []
    spans = {key: _span(gm, key) for key in members}
    outside = {n for nodes in spans.values() for m in nodes for n in m.all_input_nodes if n not in set(nodes)}
    seen = _values(gm, outside, some_calls(recalls.calls, min(g.sites[0].how.n_samples for g in groups)))
    found = []
    for key, own in members.items():
        nodes = spans[key]
        inside = set(nodes)
        reads = {n for m in nodes for n in m.all_input_nodes if n not in inside}
        results = [n for n in nodes if any(u not in inside for u in n.users) and isinstance(n.meta["val"], Tensor)]
        results = [n for n in results if n.meta["val"].is_floating_point()]
        inputs = [{n: values[n] for n in reads} for values in seen]
        found.append(Block(own, [Judge(gm, g) for g in own], nodes, results, inputs))
    return found


def _key(node: fx.Node) -> str | None:
    match = _NUMBER.match(module_path(node))
    return None if match is None else match.group()


def _span(gm: fx.GraphModule, key: str) -> list[fx.Node]:
    """The calls of operators of a module; constants stand outside."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and _key(n) == key]


def some_calls(calls: Sequence[Sequence[Any]], samples: int) -> list[Sequence[Any]]:
    """The first calls, with about so many samples."""
    found: list[Sequence[Any]] = []
    for call in calls:
        sizes = [len(x) for x in pytree.tree_leaves(call) if isinstance(x, Tensor) and x.ndim]
        if found and samples <= 0:
            break
        found.append(call)
        samples -= max(sizes, default=1)
    return found


def _values(gm: fx.GraphModule, wanted: set[fx.Node], calls: Sequence[Sequence[Any]]) -> list[dict[fx.Node, Any]]:
    """What some nodes give, in each call; of calls that hold too much the first."""
    found: list[dict[fx.Node, Any]] = []
    size = 0
    for call in calls:
        seen: dict[fx.Node, Any] = {}

        class Keeper(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n in wanted:
                    seen[n] = result  # noqa: B023
                return result

        with torch.no_grad():
            Keeper(gm).run(*call, enable_io_processing=False)
        found.append(seen)
        size += sum(x.nbytes for n, v in seen.items() if n.op != "get_attr" for x in pytree.tree_leaves(v)
                    if isinstance(x, Tensor))  # fmt: skip
        if size > _BYTES:
            break
    return found
