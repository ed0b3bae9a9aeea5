"""Who can take the scale of a value in: constants that, divided by it, give the value divided by it.

From the value backwards, the last operator first: each one's inputs are scaled as `_channels.ways` says, until nothing
but constants is left to scale. Where there are several ways (either factor of a product) they are tried one after the
other. Whoever else reads a value on the way would see it scaled: then there is no way, unless it is a norm (or another
product with a constant) that is cheap to compute twice, once scaled and once as it was. A reader that wants one part of
a value scaled sees the others as they were, or does not read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.graph import get_tensor, is_float, mutated_attrs, val
from inc_graph.oppattern import pattern_of
from inc_graph.passes._channels import TUPLES, Tie, Way, places, readers, ways

__all__ = ["Edit", "Plan", "Producers", "classes"]

_STEPS = 200  # operators that are looked at for one value, in all ways together


@dataclass(frozen=True, eq=False)
class Edit:
    """`reader` is to read `constant` divided by the scales of `index` (-1: by one), which broadcasts against it."""

    constant: fx.Node
    reader: fx.Node
    index: Tensor


@dataclass
class Plan:
    """How a value is scaled without an operator of its own.

    Attributes:
        edits: Constants that take the scale in.
        ties: Channels that need one scale.
        copies: Norms that are computed once more, and who of their readers reads the scaled result.
    """

    edits: list[Edit] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    copies: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def plus(self, ties: Iterable[Tie], edits: Iterable[Edit] = ()) -> Plan:
        """A larger one; this one stays."""
        return Plan([*self.edits, *edits], [*self.ties, *ties], dict(self.copies))

    @property
    def takers(self) -> list[fx.Node]:
        """The operators that read the scaled constants."""
        return list(dict.fromkeys(e.reader for e in self.edits))


Demands = dict[fx.Node, dict[fx.Node, Tensor]]  # value -> its readers, and the index that each wants it scaled by


class Producers:
    """Who in a float graph can take scales in. The graph must not be changed while it is asked.

    Args:
        copies: Norms may be computed once more for some of their readers.
    """

    def __init__(self, gm: fx.GraphModule, copies: bool = True) -> None:
        self.gm, self.copies, self.mutated, self.steps = gm, copies, mutated_attrs(gm), 0
        self.precision = 0.0

    def plan(self, value: fx.Node, wanted: dict[fx.Node, Tensor]) -> Plan | str:
        """A plan to scale `value` for some of its readers, or why there is none.

        Args:
            value: What the readers read.
            wanted: Reader -> index of the same channels, see `_channels`.
        """
        self.steps = 0
        self.precision = torch.finfo(val(value).dtype).eps
        if twice := next((r for r in wanted if places(r, value) > 1), None):
            return f"{twice.name} reads {value.name} in several places"
        return self._go({value: wanted}, Plan())

    def _go(self, demands: Demands, plan: Plan) -> Plan | str:
        if not demands:
            return plan
        self.steps += 1
        if self.steps > _STEPS:
            return "what it depends on was followed too far"
        node = max(demands)
        left = {k: v for k, v in demands.items() if k is not node}
        wanted = demands[node]
        if node.op == "get_attr":
            return self._constant(node, wanted, left, plan)
        merged = _merged(list(wanted.values()))
        if merged is None:
            return f"{node.name} is read in ways that do not fit together"
        index, ties = merged
        reads = dict(readers(node))
        others = [r for r, at in reads.items() if r not in wanted and not _apart(index, at)]
        if (spoiled := next((r for r, own in wanted.items() if _spoils(index, own, reads.get(r))), None)) is not None:
            return f"{spoiled.name} reads a part of {node.name} that is scaled for others"
        if node.op != "call_function":
            return f"{node.name} is an input of the model"
        found = ways(node, index)
        if isinstance(found, str):
            return found
        if others:
            found = [w for w in found if self.copies and _cheap(node, w)]
            if not found:
                return f"{node.name} is {_read_by(others[0])} too"
        failure = ""
        for way in found:
            new = {k: dict(v) for k, v in left.items()}
            bad = next((v for v, _ in way.inputs if not is_float(v) and v.target not in TUPLES), None)
            asked = _asked(way)
            if bad is not None or asked is None:
                failure = failure or (f"{bad.name} is not floating point" if bad is not None else _apart_in(node))
                continue
            for source, (inner, _) in asked.items():
                new.setdefault(source, {})[node] = inner
            larger = plan.plus([*ties, *way.ties, *(tie for _, own in asked.values() for tie in own)])
            if others:
                larger.copies[node] = list(wanted)
            result = self._go(new, larger)
            if isinstance(result, Plan):
                return result
            failure = failure or result
        return failure

    def _constant(self, node: fx.Node, wanted: dict[fx.Node, Tensor], left: Demands, plan: Plan) -> Plan | str:
        if node.target in self.mutated:
            return f"{node.target} is a buffer that the model writes to"
        tensor = get_tensor(self.gm, node)
        if tensor.is_meta or not tensor.is_floating_point():
            return f"{node.target} has no values"
        if torch.finfo(tensor.dtype).eps > self.precision:
            return f"{node.target} has less precision than the value"
        if not tensor.ndim and any(index.numel() > 1 and val(r).dtype != tensor.dtype for r, index in wanted.items()):
            return f"{node.target} is a number of another dtype, and would decide that of the result as a vector"
        return self._go(left, plan.plus((), [Edit(node, reader, index) for reader, index in wanted.items()]))


def _merged(indices: list[Tensor]) -> tuple[Tensor, list[Tie]] | None:
    """One index for all who want a value scaled, and what has to be equal for that; None if their periods differ."""
    found, ties = indices[0], []
    for index in indices[1:]:
        if any(m != n and 1 not in (m, n) for m, n in zip(found.shape, index.shape, strict=True)):
            return None
        a, b = torch.broadcast_tensors(found, index)
        both = (a >= 0) & (b >= 0)
        ties += [(a[both], b[both])] if bool((a[both] != b[both]).any()) else []
        found = torch.where(a >= 0, a, b)
    return found, ties


def _asked(way: Way) -> dict[fx.Node, tuple[Tensor, list[Tie]]] | None:
    """{value: the index that an operator wants it scaled by, in all of its places; what has to be equal for that}. None
    if one place wants what another one must not have."""
    found: dict[fx.Node, list[Tensor]] = {}
    for source, index in way.inputs:
        found.setdefault(source, []).append(index)
    asked = {source: _merged(indices) for source, indices in found.items()}
    if any(m is None or any(_spoils(m[0], own, None) for own in found[source]) for source, m in asked.items()):
        return None
    return {source: m for source, m in asked.items() if m is not None}


def _apart_in(node: fx.Node) -> str:
    return f"{node.name} reads one value in several places, which cannot be scaled alike"


def _spoils(index: Tensor, own: Tensor, positions: Tensor | None) -> bool:
    """Whether a reader that wants `own` gets something scaled by `index` that it wants as it is. `positions`: those
    that it reads; None: all."""
    a, b = torch.broadcast_tensors(index, own)
    clash = (a >= 0) & (b < 0)
    if positions is not None and bool(clash.any()):
        clash, at = torch.broadcast_tensors(clash, positions.expand([max(n, 1) for n in positions.shape]))
        clash = clash & at
    return bool(clash.any())


def _apart(index: Tensor, positions: Tensor | None) -> bool:
    """Whether nothing that a reader reads is scaled."""
    if positions is None:
        return False
    a, b = torch.broadcast_tensors(index, positions.expand([max(n, 1) for n in positions.shape]))
    return bool((a[b] < 0).all())


def _cheap(node: fx.Node, way: Way) -> bool:
    """Whether it may be computed once more: what scales constants alone, and is no layer."""
    pattern = pattern_of(node)
    alone = all(v.op == "get_attr" for v, _ in way.inputs)
    return alone and (pattern is None or pattern.weight is None)


def _read_by(reader: fx.Node) -> str:
    return "a result of the model" if reader.op == "output" else f"read by {reader.name}"


def classes(ties: Iterable[Tie], channels: int) -> Tensor | str:
    """int64 [channels]: equal numbers for channels that need one scale. A text if one would need the scale 1."""
    pairs: list[tuple[Any, Any]] = []
    for a, b in ties:
        a, b = (t.flatten() for t in torch.broadcast_tensors(a, b))
        if bool(((a < 0) != (b < 0)).any()):
            return "channels are shared with what is not scaled"
        pairs.append((a[a >= 0], b[b >= 0]))
    found = torch.arange(channels)
    while pairs:
        before = found.clone()
        for a, b in pairs:
            least = torch.minimum(found[a], found[b])
            found.scatter_reduce_(0, a, least, "amin")
            found.scatter_reduce_(0, b, least, "amin")
        found = found[found]
        if torch.equal(found, before):
            break
    return found
