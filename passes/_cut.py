"""The cheapest way to label values when neighbours with different labels cost: a minimum cut of a hypergraph.

A net is a set of pins; it costs its weight, once, if its pins do not all have the same label. Some pins have a label
from the start. Each net becomes two nodes of a flow network,

    pin --inf--> in --weight--> out --inf--> pin

so that one unit of flow through a net blocks it for all of its pins (Lawler 1973); the maximum flow is found by
Dinitz's algorithm: shortest augmenting paths, level by level.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping

__all__ = ["minimum_cut"]

_INFINITE = 1 << 62


def minimum_cut(nets: Iterable[tuple[int, Iterable[Hashable]]], fixed: Mapping[Hashable, bool]) -> set[Hashable]:
    """The pins labelled True in a labelling of least cost.

    Of several it is the one with the fewest: whatever is as good False is False.

    Args:
        nets: (weight >= 0, pins).
        fixed: Label of the pins that have one already.
    """
    flow = _Flow()
    source, sink = flow.node(), flow.node()
    pins: dict[Hashable, int] = {}

    def node_of(pin: Hashable) -> int:
        if pin not in pins:
            known = fixed.get(pin)
            pins[pin] = flow.node() if known is None else source if known else sink
        return pins[pin]

    for weight, members in nets:
        ends = {node_of(pin) for pin in members}
        if len(ends) < 2 or weight == 0:
            continue
        enter, leave = flow.node(), flow.node()
        flow.edge(enter, leave, weight)
        for end in ends:
            flow.edge(end, enter, _INFINITE)
            flow.edge(leave, end, _INFINITE)
    reached = flow.run(source, sink)
    return {pin for pin, node in pins.items() if node in reached}


class _Flow:
    """A network; edge i and its reverse i ^ 1 share what is left of the capacity."""

    def __init__(self) -> None:
        self.out: list[list[int]] = []
        self.end: list[int] = []
        self.left: list[int] = []

    def node(self) -> int:
        self.out.append([])
        return len(self.out) - 1

    def edge(self, a: int, b: int, capacity: int) -> None:
        for start, end, left in ((a, b, capacity), (b, a, 0)):
            self.out[start].append(len(self.end))
            self.end.append(end)
            self.left.append(left)

    def run(self, source: int, sink: int) -> set[int]:
        """Push as much as goes through; the nodes that can still be reached from the source."""
        while True:
            level = self._levels(source)
            if sink not in level:
                return set(level)
            place = [0] * len(self.out)
            while self._push(source, sink, level, place):
                pass

    def _levels(self, source: int) -> dict[int, int]:
        level, todo = {source: 0}, deque([source])
        while todo:
            node = todo.popleft()
            for e in self.out[node]:
                if self.left[e] and self.end[e] not in level:
                    level[self.end[e]] = level[node] + 1
                    todo.append(self.end[e])
        return level

    def _push(self, source: int, sink: int, level: dict[int, int], place: list[int]) -> bool:
        """One augmenting path along rising levels; False if there is none left."""
        path: list[int] = []
        node = source
        while node != sink:
            edges = self.out[node]
            while place[node] < len(edges):
                e = edges[place[node]]
                if self.left[e] and level.get(self.end[e]) == level[node] + 1:
                    break
                place[node] += 1
            if place[node] < len(edges):
                path.append(edges[place[node]])
                node = self.end[path[-1]]
            elif not path:
                return False
            else:  # a dead end
                node = self.end[path.pop() ^ 1]
                place[node] += 1
        amount = min(self.left[e] for e in path)
        for e in path:
            self.left[e] -= amount
            self.left[e ^ 1] += amount
        return True
