"""Convert the layers of a model's blocks in the order in which they run, each on what the rounded ones before it give.

All kept inputs run through a block in lockstep: each call waits before the first of some layers that read the same
tensor (q, k and v), until the products of what all calls bring there are collected and these layers are rounded; then
it goes on with the rounded weights. So every layer is computed once, and calibrated on what all rounded layers before
it give.

Calls that wait hold what they have computed. Where that would be too much, or a layer is called twice, a block runs
two times instead: once to collect the inputs of all of its layers, and once more, rounded, for the inputs of the next.

Both ways compute in bfloat16 where the machine does that fast.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.fast import fast_dtype
from inc_graph.graph import peek_meta
from inc_graph.options import parse_algorithm
from inc_graph.products import add_products
from inc_graph.quantization.block_inputs import BlockInputs, Call, Stop, grams
from inc_graph.quantization.finish import observers_of
from inc_graph.quantization.layers import put
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.lockstep import Lockstep
from inc_graph.quantization.streaming import float_layer, is_streamed

__all__ = ["BlockByBlock"]

LOCKSTEP_BYTES = 2 << 30
"""Calls of a block wait in its middle for its layers to be rounded, if together they hold no more than this."""


_ROWS = 4096


@dataclass
class _Group:
    """Layers that read the same tensor, and the products of what was seen of it."""

    leaves: list[Leaf]
    total: Tensor | None = None
    rows: int = 0
    last: Tensor | None = None
    known: dict[Any, Any] = field(default_factory=dict)
    waiting: Tensor | None = None  # room for rows that are not multiplied yet: many at once are faster
    filled: int = 0

    def take(self, x: Tensor) -> None:
        if x is self.last:
            return
        self.last = x
        rows = x.detach().reshape(-1, x.shape[-1])
        self.rows += len(rows)
        if self.waiting is None:  # of the dtype that the layers multiply
            kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else rows.dtype
            self.waiting = rows.new_empty(_ROWS, rows.shape[1], dtype=kind)
        while len(rows):
            some = rows[: _ROWS - self.filled]
            self.waiting[self.filled : self.filled + len(some)] = some
            self.filled, rows = self.filled + len(some), rows[len(some) :]
            if self.filled == _ROWS:
                self.multiply()

    def multiply(self) -> None:
        if self.waiting is not None and self.filled:
            self.total = add_products(self.total, self.waiting[: self.filled], inplace=True)
            self.filled = 0

    def seen(self) -> None:
        """All calls have been."""
        self.multiply()
        self.last = self.waiting = None


@dataclass
class BlockByBlock:
    """The order of the work, and the state between two layers.

    Args:
        model: Prepared, and calibrated as far as its first block.
        inputs: What calibration has left.
        places: Every leaf of the model with its paths.

    Of each layer that `order` gives, `before` has the inputs collected and `after` takes the result; `close` ends all.
    """

    model: nn.Module
    inputs: BlockInputs
    places: dict[Leaf, list[str]]
    hidden: list[Tensor] = field(init=False)
    done: dict[Leaf, Leaf] = field(init=False, default_factory=dict)
    block: int = field(init=False, default=-1)
    groups: list[_Group] = field(init=False, default_factory=list)
    together: Lockstep | None = field(init=False, default=None)  # the calls of the block, if they run in lockstep
    stage: int = field(init=False, default=0)  # groups whose inputs are known by now
    floats: contextlib.ExitStack = field(init=False, default_factory=contextlib.ExitStack)
    twins: dict[Leaf, nn.Module] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.hidden = [call.hidden for call in self.inputs.calls]

    # --------------------------------------------------------------------------------------------------------- order
    def order(self) -> Iterator[Leaf]:
        """All leaves: those before the blocks, those of one block after the other, those behind the blocks."""
        outside = self._inside(None)
        late = [leaf for leaf in outside if not _has_seen(leaf)]
        yield from (leaf for leaf in outside if leaf not in late)
        for b in range(len(self.inputs.paths)):
            inside = self._inside(b)
            yield from (leaf for leaf in inside if not grams(leaf))  # rounded before any data runs
            if any(grams(leaf) for leaf in inside):
                self._enter(b)
                yield from [leaf for group in self.groups for leaf in group.leaves]
                reached = {leaf for group in self.groups for leaf in group.leaves}
                yield from (leaf for leaf in inside if grams(leaf) and leaf not in reached)
        yield from late

    def _inside(self, block: int | None) -> list[Leaf]:
        """The leaves of a block; of none, for None."""
        return [leaf for leaf in self.places if self._block_of(leaf) == block]

    def _block_of(self, leaf: Leaf) -> int | None:
        for b, path in enumerate(self.inputs.paths):
            if any(p.startswith(f"{path}.") for p in self.places[leaf]):
                return b
        return None

    def before(self, leaf: Leaf) -> None:
        """Have the layer's inputs collected, if it wants them."""
        if self._block_of(leaf) is None:
            if self.block >= 0 and any(not o.elements for o in observers_of(leaf)):
                self._tail()
            return
        at = next((i for i, group in enumerate(self.groups) if leaf in group.leaves), None)
        if at is None or not grams(leaf):
            return
        group = self.groups[at]
        if self.together is not None:
            while self.stage <= at:
                self._step()
        elif _sequential(leaf) and at and leaf is group.leaves[0]:
            self._collect(group)
        if group.total is not None:
            _fill(leaf, group)

    def after(self, leaf: Leaf, converted: Leaf | None) -> None:
        """Take the rounded layer; None if it stays float."""
        if converted is not None:
            self.done[leaf] = converted
            if leaf in self.twins:  # calls that wait go on with the rounded weight
                self.twins[leaf]._parameters["weight"] = _twin(leaf, converted)._parameters["weight"]
        group = next((g for g in self.groups if leaf in g.leaves), None)
        if group is not None:
            for observer in grams(leaf):  # large, and collected anew if the model is converted again
                observer.reset()
            if leaf is group.leaves[-1]:
                group.total, group.known = None, {}

    def close(self) -> None:
        """Put everything back in its place, also in the middle of a block."""
        if self.together is not None:
            self.together.close()
        self.together, self.twins = None, {}
        self.floats.close()

    def _enter(self, block: int) -> None:
        """Begin the next block: find out which layers read the same tensor, and collect inputs if not in lockstep."""
        while self.block < block:
            if self.block >= 0:
                self._advance()
            self.block += 1
        self.groups, self.stage = [], 0
        found = self._probe()
        if found is None or self._waiting_bytes(found) > LOCKSTEP_BYTES:
            self._collect(None)
            return
        self.groups = found
        self.twins = self.floats.enter_context(self._placed())
        self.together = Lockstep(lambda i: self._run(self.hidden[i], self.inputs.calls[i]), len(self.hidden))
        for group in found:
            self.twins[group.leaves[0]].register_forward_pre_hook(self._wait)

    def _wait(self, module: nn.Module, args: Any) -> None:
        assert self.together is not None
        self.together.pause(args[0])

    def _step(self) -> None:
        """Let all calls go on to the next group of layers, and collect what it reads."""
        assert self.together is not None
        with torch.no_grad(), _fast():
            for x in self.together.step():
                self.groups[self.stage].take(x)
        self.groups[self.stage].seen()
        self.stage += 1

    def _waiting_bytes(self, groups: list[_Group]) -> float:
        """About what the calls of a block hold while they wait in its middle; no end where memory is short anyway."""
        if any(is_streamed(leaf) for group in groups for leaf in group.leaves):
            return math.inf
        features = sum(group.leaves[0].form.size * (1 + len(group.leaves)) for group in groups)
        return 4 * features * sum(h[..., 0].numel() for h in self.hidden)

    def _probe(self) -> list[_Group] | None:
        """The groups of layers that read one tensor, in the order in which they are called, seen in one call; None if a
        layer is called more than once, or never."""
        groups: list[_Group] = []
        wanted = [leaf for leaf in self._inside(self.block) if grams(leaf)]
        seen: list[Leaf] = []

        def hook(leaf: Leaf) -> Any:
            def take(module: nn.Module, args: Any) -> None:
                seen.append(leaf)
                if not groups or groups[-1].last is not args[0]:
                    groups.append(_Group([], last=args[0]))
                groups[-1].leaves.append(leaf)

            return take

        with self._floats() as twins:
            for leaf in wanted:
                twins[leaf].register_forward_pre_hook(hook(leaf))
            self._run(self.hidden[0], self.inputs.calls[0])
        for group in groups:
            group.last = None
        return groups if len(seen) == len(set(seen)) == len(wanted) else None

    # ---------------------------------------------------------------------------------------------------------- runs
    def _collect(self, only: _Group | None) -> None:
        """One run of a block's inputs for the products of the inputs of its layers (of one group alone)."""
        wanted = [leaf for leaf in self._inside(self.block) if grams(leaf)]
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
            group.seen()

    def _advance(self) -> None:
        """The outputs of the current block, as it is by now, are the inputs of the next one."""
        if self.together is not None:
            while self.stage < len(self.groups):
                self._step()
            with torch.no_grad(), _fast():
                self.hidden = self.together.step()
            self.close()
            return
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
        replays = {path: _Replay(self.inputs.tuples) for path in self.inputs.paths}
        blocks = {path: self.model.get_submodule(path) for path in self.inputs.paths}
        own = self.model.__dict__["_inc_forward"] or type(self.model).forward.__get__(self.model)
        watching = [(o, o.enabled) for leaf in self._inside(None) for o in grams(leaf)]
        try:
            for observer, _ in watching:
                observer.enabled = not observer.elements  # those before the blocks have seen all
            for path, stub in replays.items():
                put(self.model, [path], stub)
            for i, call in enumerate(self.inputs.calls):
                replays[self.inputs.paths[-1]].result = self.hidden[i]
                assert call.whole is not None
                with torch.no_grad():
                    own(*call.whole[0], **call.whole[1])
        finally:
            for observer, enabled in watching:
                observer.enabled = enabled
            for path, block in blocks.items():
                put(self.model, [path], block)

    @contextlib.contextmanager
    def _floats(self) -> Iterator[dict[Leaf, nn.Module]]:
        """As `_placed`, and ready to run data through."""
        with self._placed() as twins, torch.no_grad(), _fast():
            yield twins

    @contextlib.contextmanager
    def _placed(self) -> Iterator[dict[Leaf, nn.Module]]:
        """Plain layers in the places of the current block's leaves, rounded ones with their rounded weights."""
        twins = {leaf: _twin(leaf, self.done.get(leaf)) for leaf in self._inside(self.block)}
        try:
            for leaf, twin in twins.items():
                put(self.model, self.places[leaf], twin)
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
    if fast_dtype() == torch.bfloat16:
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _has_seen(leaf: Leaf) -> bool:
    return all(o.elements for o in observers_of(leaf))


def _fill(leaf: Leaf, group: _Group) -> None:
    for observer in grams(leaf):
        observer.total, observer.count, observer.known = group.total, group.rows, group.known
        observer.elements = group.rows * group.total.shape[0]  # type: ignore[union-attr]


def _sequential(leaf: Leaf) -> bool:
    """Whether its method wants the inputs of each layer after those before it in the block are rounded."""
    notes = [peek_meta(node).get("weight", {}) for node in leaf.inner.graph.nodes]  # type: ignore[union-attr]
    return any(parse_algorithm(n["algorithm"])[1].get("true_sequential") for n in notes if n)
