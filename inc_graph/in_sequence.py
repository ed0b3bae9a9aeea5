"""Weights of a graph rounded in sequence: each on what the already rounded layers before it give.

The kept calls of an observed graph run side by side. Where the pass that rounds asks for what a layer reads, they go on
to that layer, and what all of them bring there is collected. The rounded weight is told, and they go on with it. Layers
that read one value ask for the same thing, and the calls stop there once.

A weight that several layers share is rounded once, where the first of them stands, on the inputs of all of them. Those
of the others are not known there: they are what the float graph gives.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.aside import Aside, Kept
from inc_graph.errors import CalibrationError
from inc_graph.fast import fast_dtype
from inc_graph.gram import GramObserver
from inc_graph.graph import get_attr, get_tensor, module_path, peek_meta, view_key
from inc_graph.oppattern import argument, pattern_of
from inc_graph.side_by_side import SideBySide
from inc_graph.weights import Codes, Gram

__all__ = ["IN_SEQUENCE", "InSequence"]

IN_SEQUENCE = "inc_in_sequence"
"""Key of the `meta` of an observed graph under which `convert-qdq` finds an `InSequence` of it, and takes it out."""

_ROWS = 4096  # many rows at once are multiplied faster


class InSequence:
    """What `convert-qdq` asks for the inputs of layers, in the order of the graph.

    Args:
        gm: The observed graph. Taken over: its gram observers are filled and emptied.
        calls: For each call a value for each placeholder. Gone through twice if layers share a weight.
        step: Told the name of each layer that is rounded.
        aside: Where the values of calls wait for the other calls; None: in memory.

    Attributes:
        seconds: That the calls took.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        calls: Iterable[Sequence[Any]],
        step: Callable[[str], None] = lambda text: None,
        aside: Aside | None = None,
    ) -> None:
        self.step, self.seconds = step, 0.0
        self._layers = {n.name: n for n in gm.graph.nodes if "weight" in peek_meta(n)}
        self._stops: dict[str, tuple[fx.Node, GramObserver]] = {}
        for node in gm.graph.find_nodes(op="call_module"):
            if isinstance(observer := get_attr(gm, str(node.target)), GramObserver):
                self._stops[str(node.target)] = node, observer
                observer.enabled, observer.batch = True, None
                observer.reset()
        self._left = Counter(peek_meta(n)["weight"].get("gram") for n in self._layers.values())
        weights = [get_tensor(gm, weight_of(n)) for n in self._layers.values()]
        plain = all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)
        fast = plain and fast_dtype() == torch.bfloat16
        goals = [node for node, _ in self._stops.values()]
        known, later = set(), set()
        for node, weight in zip(self._layers.values(), weights, strict=True):
            if (key := view_key(weight)) in known:
                later.add(peek_meta(node)["weight"].get("gram"))
            known.add(key)
        self._later = self._in_float(gm, calls, [name for name in self._stops if name in later], fast)
        self.calls = SideBySide(gm, calls, goals, fast, aside)

    def _in_float(
        self, gm: fx.GraphModule, calls: Iterable[Sequence[Any]], names: list[str], fast: bool
    ) -> dict[str, Gram]:
        """What gram observers are to know in the float graph; the calls run one after the other."""
        start = time.perf_counter()
        for i, call in enumerate(calls if names else (), 1):
            run = SideBySide(gm, [call], [self._stops[name][0] for name in names], fast)
            for name in names:
                node, observer = self._stops[name]
                _collect(observer, run.to(node), i)
        found = {name: self._stops[name][1].gram() for name in names}
        for name in names:
            self._stops[name][1].reset()
        self.seconds += time.perf_counter() - start
        return found

    def later(self, name: str) -> Gram:
        """As `get`, in the float graph; of a layer that shares its weight with one before it."""
        return self._later[name]

    def get(self, name: str | None) -> Gram | None:
        """What is known of the values that a gram observer stands for; None for None.

        Raises:
            CalibrationError: they are no finite numbers, or there are none.
        """
        if name is None:
            return None
        node, observer = self._stops[name]
        start = time.perf_counter()
        if self.calls.ahead(node):
            _collect(observer, self.calls.to(node))
        self.seconds += time.perf_counter() - start
        return observer.gram()

    def rounded(self, name: str, codes: Codes) -> None:
        """Go on with the rounded weight of the layer that is the node of this name."""
        node = self._layers[name]
        self.step(module_path(node) or name)
        if self.calls.ahead(node):
            read = weight_of(node)
            weight = get_tensor(self.calls.gm, read)
            self.calls.replace(node, read, codes.values().to(weight.device, weight.dtype).reshape(weight.shape))
        if (gram := peek_meta(node)["weight"].get("gram")) is not None:
            self._left[gram] -= 1
            if not self._left[gram]:
                self._stops[gram][1].reset()  # large


def weight_of(layer: fx.Node) -> fx.Node:
    """The read of a layer's weight."""
    pattern = pattern_of(layer)
    assert pattern is not None and pattern.weight is not None
    found: fx.Node = argument(layer, pattern.weight)
    return found


def _collect(observer: GramObserver, values: list[Tensor] | Kept, first: int = 1) -> None:
    """Let an observer see a value of each call; `first` is the number of the first of them."""
    try:
        for x in values if observer.unfold is not None else _joined(values):
            observer(x)
    except CalibrationError as e:
        bad = next((i for i, x in enumerate(values, first) if not bool(x.isfinite().all())), None)
        if bad is None:
            raise
        text = f"calibration call {bad}: {e.message}"
        raise CalibrationError(text, node=e.node, module=e.module, hint=e.hint) from e


def _joined(values: list[Tensor] | Kept) -> Iterator[Tensor]:
    """The rows [n, in] of all values, some thousands at a time."""
    some: list[Tensor] = []
    for i, x in enumerate(values):
        some.append(x.reshape(-1, x.shape[-1]))
        if sum(map(len, some)) >= _ROWS or i + 1 == len(values):
            yield torch.cat(some) if len(some) > 1 else some[0]
            some = []
