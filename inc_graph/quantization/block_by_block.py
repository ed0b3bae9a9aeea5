"""Convert the layers of a model's blocks in the order in which they run, each on what the rounded ones before it give.

For each block: run the kept inputs through it once and collect the products of every layer's inputs; round its layers;
run the inputs through once more, now with the rounded weights, for the inputs of the next block. Both runs compute in
bfloat16 where the machine does that fast. Layers that read the same tensor (q, k and v) share what is collected.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.gram import GramObserver, add_products
from inc_graph.graph import peek_meta
from inc_graph.options import parse_algorithm
from inc_graph.quantization.block_inputs import BlockInputs, Call, Stop
from inc_graph.quantization.finish import observers_of
from inc_graph.quantization.layers import put
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.streaming import float_layer

__all__ = ["BlockByBlock"]


@dataclass
class _Group:
    """Layers that read the same tensor."""

    leaves: list[Leaf]
    total: Tensor | None = None
    rows: int = 0
    last: Tensor | None = None
    known: dict[Any, Any] = field(default_factory=dict)

    def take(self, x: Tensor) -> None:
        if x is self.last:
            return
        self.last = x
        rows = x.detach().reshape(-1, x.shape[-1])
        self.total, self.rows = add_products(self.total, rows), self.rows + len(rows)


@dataclass
class BlockByBlock:
    """The order of the work, and the state between two layers.

    Args:
        model: Prepared, and calibrated as far as its first block.
        inputs: What calibration has left.
        places: Every leaf of the model with its paths.

    Before a layer is rounded, `before` sees to it that its observers have seen their inputs; `after` takes the result.
    """

    model: nn.Module
    inputs: BlockInputs
    places: dict[Leaf, list[str]]
    hidden: list[Tensor] = field(init=False)
    done: dict[Leaf, Leaf] = field(init=False, default_factory=dict)
    block: int = field(init=False, default=-1)
    groups: list[_Group] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.hidden = [call.hidden for call in self.inputs.calls]

    # --------------------------------------------------------------------------------------------------------- order
    def order(self) -> list[Leaf]:
        """All leaves: those before the blocks, those of one block after the other, those behind the blocks."""
        where = {leaf: self._block_of(leaf) for leaf in self.places}
        inside = [leaf for b in range(len(self.inputs.paths)) for leaf in self.places if where[leaf] == b]
        outside = [leaf for leaf in self.places if where[leaf] is None]
        late = [leaf for leaf in outside if not _has_seen(leaf)]
        return [leaf for leaf in outside if leaf not in late] + inside + late

    def _block_of(self, leaf: Leaf) -> int | None:
        for b, path in enumerate(self.inputs.paths):
            if any(p.startswith(f"{path}.") for p in self.places[leaf]):
                return b
        return None

    def before(self, leaf: Leaf) -> None:
        """Have the layer's inputs collected, if it wants them."""
        block = self._block_of(leaf)
        if block is None:
            if self.block >= 0 and any(not o.elements for o in observers_of(leaf)):
                self._tail()
            return
        while self.block < block:
            if self.block >= 0:
                self._advance()
            self.block += 1
            self.groups = []
            self._collect(None)
        if _sequential(leaf):
            group = next((g for g in self.groups if leaf in g.leaves), None)
            if group is not None and group is not self.groups[0] and leaf is group.leaves[0]:
                self._collect(group)
        for group in self.groups:
            if leaf in group.leaves and group.total is not None:
                _fill(leaf, group)

    def after(self, leaf: Leaf, converted: Leaf | None) -> None:
        """Take the rounded layer; None if it stays float."""
        if converted is not None:
            self.done[leaf] = converted
        if self._block_of(leaf) is not None:
            for observer in _grams(leaf):  # large, and collected anew if the model is converted again
                observer.reset()

    # ---------------------------------------------------------------------------------------------------------- runs
    def _collect(self, only: _Group | None) -> None:
        """One run of a block's inputs for the products of the inputs of its layers (of one group alone)."""
        wanted = [leaf for leaf in self.places if self._block_of(leaf) == self.block and _grams(leaf)]
        if only is not None:
            only.total, only.rows, only.last, only.known = None, 0, None, {}
            wanted = list(only.leaves)
        calls = 0
        expected: int | None = None
        group_of: dict[Leaf, _Group] = {m: g for g in self.groups for m in g.leaves}

        def hook(leaf: Leaf) -> Any:
            def take(module: nn.Module, args: Any) -> None:
                nonlocal calls
                x = args[0]
                if leaf not in group_of:
                    shared = next((g for g in self.groups if g.last is x), None)
                    if shared is None:
                        shared = _Group([])
                        self.groups.append(shared)
                    shared.leaves.append(leaf)
                    group_of[leaf] = shared
                group_of[leaf].take(x)
                calls += 1
                if calls == expected:
                    raise Stop("all inputs are known")

            return take

        with self._floats() as twins:
            hooks = [twins[leaf].register_forward_pre_hook(hook(leaf)) for leaf in wanted]
            try:
                for i, call in enumerate(self.inputs.calls):
                    calls = 0
                    with contextlib.suppress(Stop):
                        self._run(self.hidden[i], call)
                    expected = calls  # the rest of a block behind its last layer need not be computed again
            finally:
                for h in hooks:
                    h.remove()
        for group in self.groups:
            group.last = None

    def _advance(self) -> None:
        """The outputs of the current block, as it is by now, are the inputs of the next one."""
        with self._floats():
            for i, call in enumerate(self.inputs.calls):
                self.hidden[i] = self._run(self.hidden[i], call)

    def _run(self, hidden: Tensor, call: Call) -> Tensor:
        block = self.model.get_submodule(self.inputs.paths[self.block])
        result = block(hidden, *call.args, **call.kwargs)
        return (result[0] if isinstance(result, tuple) else result).to(hidden.dtype)

    def _tail(self) -> None:
        """Run what stands behind the blocks on the outputs of the last one, for the layers there."""
        while self.block < len(self.inputs.paths):
            self._advance()
            self.block += 1
            if self.block == len(self.inputs.paths):
                break
        replays = {path: _Replay(self.inputs.tuples) for path in self.inputs.paths}
        blocks = {path: self.model.get_submodule(path) for path in self.inputs.paths}
        own = self.model.__dict__["_inc_forward"] or type(self.model).forward.__get__(self.model)
        try:
            for path, stub in replays.items():
                put(self.model, [path], stub)
            for i, call in enumerate(self.inputs.calls):
                replays[self.inputs.paths[-1]].result = self.hidden[i]
                assert call.whole is not None
                with torch.no_grad():
                    own(*call.whole[0], **call.whole[1])
        finally:
            for path, block in blocks.items():
                put(self.model, [path], block)

    @contextlib.contextmanager
    def _floats(self) -> Iterator[dict[Leaf, nn.Module]]:
        """Plain layers in the places of the current block's leaves, rounded ones with their rounded weights."""
        inside = [leaf for leaf in self.places if self._block_of(leaf) == self.block]
        twins = {leaf: _twin(leaf, self.done.get(leaf)) for leaf in inside}
        try:
            for leaf, twin in twins.items():
                put(self.model, self.places[leaf], twin)
            with torch.no_grad(), _fast():
                yield twins
        finally:
            for leaf in twins:
                put(self.model, self.places[leaf], leaf)


class _Replay(nn.Module):
    """Stands where a block stood; gives `result`, or what it is called with."""

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.tuples = tuples
        self.result: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point())
        value = given if self.result is None else self.result
        return (value,) if self.tuples else value


def _twin(leaf: Leaf, converted: Leaf | None) -> nn.Module:
    """The float layer of a leaf; of one that is rounded, with the values of its rounded weight."""
    twin = copy.copy(float_layer(leaf))
    twin.__dict__["_forward_pre_hooks"] = type(twin._forward_pre_hooks)()
    values = {name: None if p is None else p.detach() for name, p in twin._parameters.items()}
    if converted is not None:
        values["weight"] = converted.weight.detach().to(values["weight"].dtype)  # type: ignore[union-attr]
    # parameters that want a gradient: autocast keeps the casts of such, and casts others at each call
    twin._parameters = {name: None if v is None else nn.Parameter(v) for name, v in values.items()}
    return twin


def _fast() -> Any:
    """Autocast to bfloat16, where that is fast."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _grams(leaf: Leaf) -> list[GramObserver]:
    return [o for o in observers_of(leaf) if isinstance(o, GramObserver)]


def _has_seen(leaf: Leaf) -> bool:
    return all(o.elements for o in observers_of(leaf))


def _fill(leaf: Leaf, group: _Group) -> None:
    for observer in _grams(leaf):
        observer.total, observer.count, observer.known = group.total, group.rows, group.known
        observer.elements = group.rows * group.total.shape[0]  # type: ignore[union-attr]


def _sequential(leaf: Leaf) -> bool:
    """Whether its method wants the inputs of each layer after those before it in the block are rounded."""
    notes = [peek_meta(node).get("weight", {}) for node in leaf.inner.graph.nodes]  # type: ignore[union-attr]
    return any(parse_algorithm(n["algorithm"])[1].get("true_sequential") for n in notes if n)
