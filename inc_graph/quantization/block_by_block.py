"""Convert the layers of a model's blocks in the order in which they run, each on what the rounded ones before it give.

All kept inputs run through a block in lockstep: each call waits before the first of some layers that read the same
tensor (q, k and v), until the products of what all calls bring there are collected and these layers are rounded; then
it goes on with the rounded weights. So every layer is computed once, and calibrated on what all rounded layers before
it give.

Calls that wait hold what they have computed. Where that would be too much, a layer is called twice, or calls do not all
take the same way through a block (branches, experts), a block runs two times instead: once to collect the inputs of all
of its layers, and once more, rounded, for the inputs of the next.

Both ways compute in bfloat16 where the machine does that fast, and the model can be run so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.aside import Kept
from inc_graph.errors import CalibrationError, IncError
from inc_graph.fast import fast_dtype
from inc_graph.graph import peek_meta
from inc_graph.options import parse_algorithm
from inc_graph.quantization.block_inputs import BlockInputs, Call, Stop, grams
from inc_graph.quantization.hidden_runs import Buffers
from inc_graph.quantization.layer_groups import Apart, Group, Pause, input_of, twin_of
from inc_graph.quantization.layers import put
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.lockstep import Lockstep
from inc_graph.quantization.prefix import calls_behind, rounded_before
from inc_graph.quantization.streaming import give_back, is_streamed
from inc_graph.quantization.tail import run_tail

__all__ = ["BlockByBlock", "is_sequential"]

LOCKSTEP_BYTES = 2 << 30
"""Calls of a block wait in its middle for its layers to be rounded, if together they hold no more than this."""


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
    calls: list[Call] = field(init=False)  # of the first block
    hidden: Kept = field(init=False)
    done: dict[Leaf, Leaf] = field(init=False, default_factory=dict)
    block: int = field(init=False, default=-1)
    groups: list[Group] = field(init=False, default_factory=list)
    together: Lockstep | None = field(init=False, default=None)  # the calls of the block, if they run in lockstep
    stage: int = field(init=False, default=0)  # groups whose inputs are known by now
    apart: bool = field(init=False, default=False)  # each layer is a group of its own
    regular: bool = field(init=False, default=False)  # every call calls each layer of the block once
    fast: bool = field(init=False, default_factory=lambda: fast_dtype() == torch.bfloat16)
    floats: contextlib.ExitStack = field(init=False, default_factory=contextlib.ExitStack)
    twins: dict[Leaf, nn.Module] = field(init=False, default_factory=dict)
    early: list[Leaf] = field(init=False, default_factory=list)  # what is rounded before the first block
    beside: list[Leaf] = field(init=False)  # of blocks, and data has reached them on another way, which is not used
    twice: list[str] = field(init=False, default_factory=list)  # blocks that do not run in lockstep
    buffers: Buffers = field(init=False)  # what the runs of blocks write to buffers is taken back

    def __post_init__(self) -> None:
        self._begin_with(self.inputs.calls)
        self.beside = [leaf for leaf in self._in_blocks() if any(o.elements for o in grams(leaf))]
        self.buffers = Buffers(self.model)

    # --------------------------------------------------------------------------------------------------------- order
    def order(self) -> Iterator[Leaf]:
        """All leaves: those before the blocks, those of one block after the other, those behind the blocks."""
        outside = self._inside(None)
        late = [leaf for leaf in outside if leaf.path in self.inputs.behind]
        self.early = [leaf for leaf in outside if leaf not in late]
        yield from self.early
        self._begin_with(calls_behind(self.model, self.inputs, self.places, self.done))
        for b in range(len(self.inputs.paths)):
            inside = self._inside(b)
            yield from (leaf for leaf in inside if not grams(leaf))  # rounded before any data runs
            if any(grams(leaf) for leaf in inside):
                self._enter(b)
                yield from [leaf for group in self.groups for leaf in group.leaves]
                reached = {leaf for group in self.groups for leaf in group.leaves}
                yield from (leaf for leaf in inside if grams(leaf) and leaf not in reached)
        yield from late

    def _begin_with(self, calls: list[Call]) -> None:
        self.calls, self.hidden = calls, Kept([call.hidden for call in calls], self.inputs.aside)

    def _inside(self, block: int | None) -> list[Leaf]:
        """The leaves of a block; of none, for None."""
        return [leaf for leaf in self.places if self._block_of(leaf) == block]

    def _in_blocks(self) -> list[Leaf]:
        return [leaf for leaf, paths in self.places.items() if self.inputs.holds(paths)]

    def _block_of(self, leaf: Leaf) -> int | None:
        for b, path in enumerate(self.inputs.paths):
            if any(p.startswith(f"{path}.") for p in self.places[leaf]):
                return b
        return None

    def before(self, leaf: Leaf) -> None:
        """Have the layer's inputs collected, if it wants them."""
        if self._block_of(leaf) is None:
            if leaf.path in self.inputs.behind and self.block < len(self.inputs.paths):
                self._tail()
            return
        lockstep = self.together is not None
        while self.together is not None and (at := self._place(leaf)) is not None and self.stage <= at:
            self._step()
        at = self._place(leaf)
        if at is None or not grams(leaf):
            return
        group = self.groups[at]
        if not lockstep and is_sequential(leaf) and at and leaf is group.leaves[0]:
            self._collect(group)
        if group.total is not None:
            group.fill(leaf)

    def _place(self, leaf: Leaf) -> int | None:
        """Which group a layer is in."""
        return next((i for i, group in enumerate(self.groups) if leaf in group.leaves), None)

    def after(self, leaf: Leaf, converted: Leaf | None) -> None:
        """Take the rounded layer; None if it stays float."""
        if converted is not None:
            self.done[leaf] = converted
            if leaf in self.twins:  # calls that wait go on with the rounded weight
                self.twins[leaf]._parameters["weight"] = twin_of(leaf, converted)._parameters["weight"]
        group = next((g for g in self.groups if leaf in g.leaves), None)
        if group is not None:
            for observer in grams(leaf):  # large, and collected anew if the model is converted again
                observer.reset()
            if leaf is group.leaves[-1]:
                group.total, group.known = None, {}
        elif leaf.path in self.inputs.behind:
            for observer in grams(leaf):
                observer.reset()

    def close(self) -> None:
        """It is over, well or not: everything is where it was."""
        self._leave()
        self.buffers.restore()
        for observer in (o for leaf in self._in_blocks() for o in grams(leaf)):
            observer.reset()

    def _leave(self) -> None:
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
        self.groups, self.stage, self.apart, self.regular = [], 0, False, False
        found = self._probe()
        if found is None or self._waiting_bytes(found) > LOCKSTEP_BYTES:
            self._twice()
            self._collect(None)
            return
        self.groups = found
        self.twins = self.floats.enter_context(self._placed())
        self.together = Lockstep(lambda i: self._run(self.hidden[i], self.calls[i]), len(self.hidden))
        for group in found:
            reads: dict[Any, Tensor] = {}  # call -> what it reads here
            for leaf in group.leaves:
                hook = self._wait(leaf, group.leaves[0], reads)
                self.twins[leaf].register_forward_pre_hook(hook, with_kwargs=True)

    def _wait(self, leaf: Leaf, first: Leaf, reads: dict[Any, Tensor]) -> Any:
        """The hook of a layer: the first of its group waits, the others have to read what that has read."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            assert self.together is not None
            call, x = self.together.current(), input_of(args, kwargs)
            if leaf is first:
                reads[call] = x
                self.together.pause(Pause(leaf, x))
            elif reads.get(call) is not x:
                text = f"it reads the tensor that {first.path} reads in the first calibration call, and another later"
                hint = "calibrate with calls that take one way through the block, or export the model first"
                raise CalibrationError(text, module=leaf.path, hint=hint)

        return hook

    def _go_on(self) -> list[Any] | None:
        """What all calls give that go on to their next stop; None if one of them fails."""
        assert self.together is not None
        try:
            with torch.no_grad(), self._autocast():
                return self.together.step()
        except IncError:
            raise
        except Exception:  # where calls run one by one it is tried again, in float, and raised if that fails as well
            return None

    def _step(self) -> None:
        """Let all calls go on to the next group of layers, and collect what it reads."""
        group = self.groups[self.stage]
        stops = self._go_on()
        if stops is None or not all(isinstance(stop, Pause) and stop.leaf is group.leaves[0] for stop in stops):
            self._one_by_one()
            return
        with torch.no_grad(), self._autocast():  # of the dtype that the layers multiply
            for stop in stops:
                group.take(stop.x)
        group.seen()
        self.stage += 1

    def _one_by_one(self) -> None:
        """The calls do not take the same way through the block: for the layers that are left they run apart."""
        known = self.groups[: self.stage]
        self._twice()
        self._leave()
        self.groups = known
        self._collect(None)

    def _twice(self) -> None:
        """Note that the layers of this block are not calibrated on what the rounded ones in it give."""
        if not any(is_sequential(leaf) for leaf in self._inside(self.block) if grams(leaf)):
            self.twice.append(self.inputs.paths[self.block])

    def notes(self) -> list[str]:
        """What the report has to say."""
        return self._note_of_early() + self._note_of_beside() + self._note_of_twice()

    def _note_of_beside(self) -> list[str]:
        if not self.beside:
            return []
        what = f"{len(self.beside)} layers of blocks were called outside of calls of the model: {_shown(self.beside)}"
        return [f"{what}; what they saw there was not used"]

    def _note_of_early(self) -> list[str]:
        early = [leaf for leaf in self.early if leaf in self.done and grams(leaf)]
        if len(early) < 2:
            return []
        what = f"{len(early)} layers before or outside of the blocks at {self.inputs.paths[0]}, ..."
        note = f"{what} were rounded on their inputs in the float model: {_shown(early)}"
        return [f"{note}; true_sequential=True had no effect on them" if any(map(is_sequential, early)) else note]

    def _note_of_twice(self) -> list[str]:
        if not self.twice:
            return []
        what = f"{len(self.twice)} of {len(self.inputs.paths)} blocks, from {self.twice[0]} on"
        streamed = any(is_streamed(leaf) for leaf in self.places)
        why = "values of the model stay in its checkpoint" if streamed else "calls cannot wait in the middle of them"
        return [
            f"in {what}, layers were rounded on what the rounded blocks before theirs give, not on what the rounded"
            f" layers before them in the block give: {why}; true_sequential=True does both, and takes longer"
        ]

    def _waiting_bytes(self, groups: list[Group]) -> float:
        """About what the calls of a block hold while they wait in its middle; no end where memory is short anyway."""
        if any(is_streamed(leaf) for group in groups for leaf in group.leaves):
            return math.inf
        features = sum(group.leaves[0].form.size * (1 + len(group.leaves)) for group in groups)
        return 4 * features * sum(h[..., 0].numel() for h in self.hidden)

    def _probe(self) -> list[Group] | None:
        """The groups of layers that read one tensor, in the order in which they are called, seen in one call; None if a
        layer is called more than once, or never."""
        wanted = [leaf for leaf in self._inside(self.block) if grams(leaf)]
        try:
            groups = self._groups_of_one_call(wanted)
        except IncError:
            raise
        except Exception:
            if not self.fast:
                raise
            self.fast = False  # it cannot run under autocast
            groups = self._groups_of_one_call(wanted)
        seen = [leaf for group in groups for leaf in group.leaves]
        for group in groups:
            group.last = None
        return groups if len(seen) == len(set(seen)) == len(wanted) else None

    def _groups_of_one_call(self, wanted: list[Leaf]) -> list[Group]:
        groups: list[Group] = []

        def hook(leaf: Leaf) -> Any:
            def take(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = input_of(args, kwargs)
                if not groups or groups[-1].last is not x:
                    groups.append(Group([], last=x))
                groups[-1].leaves.append(leaf)

            return take

        with self._floats() as twins:
            for leaf in wanted:
                twins[leaf].register_forward_pre_hook(hook(leaf), with_kwargs=True)
            self._run(self.hidden[0], self.calls[0])
        return groups

    # ---------------------------------------------------------------------------------------------------------- runs
    def _collect(self, only: Group | None) -> None:
        """One run of a block's inputs for the products of the inputs of its layers (of one group alone)."""
        known = list(self.groups)
        while True:
            try:
                self._collected(only)
                return
            except IncError:
                raise
            except Apart:
                self.apart = True
            except Exception:
                if not self.fast:
                    raise
                self.fast = False
            self.groups = list(known)

    def _collected(self, only: Group | None) -> None:
        if only is not None:
            only.total, only.rows, only.last, only.known, only.filled = None, 0, None, {}, 0
            wanted = list(only.leaves)
            group_of: dict[Leaf, Group] = dict.fromkeys(wanted, only)
        else:
            known = {leaf for group in self.groups for leaf in group.leaves}
            wanted = [leaf for leaf in self._inside(self.block) if grams(leaf) and leaf not in known]
            group_of = {}
        called: list[Leaf] = []

        def hook(leaf: Leaf) -> Any:
            def take(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = input_of(args, kwargs)
                if leaf not in group_of:
                    shared = None if self.apart else next((g for g in group_of.values() if g.last is x), None)
                    if shared is None:
                        shared = Group([])
                        self.groups.append(shared)
                    shared.leaves.append(leaf)
                    group_of[leaf] = shared
                group = group_of[leaf]
                if leaf is not group.leaves[0] and group.last is not x:
                    if only is not None:
                        text = f"it reads the tensor that {group.leaves[0].path} reads in some calls, and another since"
                        raise CalibrationError(f"{text} layers before it are rounded", module=leaf.path)
                    raise Apart
                group.take(x)
                called.append(leaf)
                if only is not None and self.regular and len(called) == len(wanted):
                    raise Stop("all inputs are known")  # the rest of the block need not be computed again

            return take

        regular = True
        with self._floats() as twins:
            hooks = [twins[leaf].register_forward_pre_hook(hook(leaf), with_kwargs=True) for leaf in wanted]
            try:
                for i, call in enumerate(self.calls):
                    called.clear()
                    with contextlib.suppress(Stop):
                        self._run(self.hidden[i], call)
                    regular = regular and len(called) == len(set(called)) == len(wanted)
            finally:
                for h in hooks:
                    h.remove()
        if only is None:
            self.regular = regular
        for group in self.groups:
            group.seen()

    def _advance(self) -> None:
        """The outputs of the current block, as it is by now, are the inputs of the next one."""
        while self.together is not None and self.stage < len(self.groups):
            self._step()
        if self.together is not None:
            ends = self._go_on()
            self._leave()
            if ends is not None and all(isinstance(x, Tensor) for x in ends):
                self.hidden = Kept(ends, None)
                return
        for i, call in enumerate(self.calls):
            try:
                with self._floats():
                    self.hidden[i] = self._run(self.hidden[i], call)
            except Exception:
                if not self.fast:
                    raise
                self.fast = False
                with self._floats():
                    self.hidden[i] = self._run(self.hidden[i], call)

    def _run(self, hidden: Tensor, call: Call) -> Tensor:
        result = call.run(self.model.get_submodule(self.inputs.paths[self.block]), hidden)
        return (result[0] if isinstance(result, tuple) else result).to(hidden.dtype)

    def _tail(self) -> None:
        """Run what stands behind the blocks on the outputs of the last one, for the layers there."""
        while self.block < len(self.inputs.paths):
            self._advance()
            self.block += 1
        with rounded_before(self.model, self.inputs, self.places, self.done):
            run_tail(self.model, self.inputs, self.hidden, self.places, self.done)

    @contextlib.contextmanager
    def _floats(self) -> Iterator[dict[Leaf, nn.Module]]:
        """As `_placed`, and ready to run data through."""
        with self._placed() as twins, torch.no_grad(), self._autocast():
            yield twins
        if self.inputs.aside is not None:
            give_back()

    def _autocast(self) -> Any:
        """Autocast to bfloat16, where that is fast and the model takes it."""
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.fast else contextlib.nullcontext()

    @contextlib.contextmanager
    def _placed(self) -> Iterator[dict[Leaf, nn.Module]]:
        """Plain layers in the places of the current block's leaves, rounded ones with their rounded weights."""
        twins = {leaf: twin_of(leaf, self.done.get(leaf)) for leaf in self._inside(self.block)}
        try:
            for leaf, twin in twins.items():
                put(self.model, self.places[leaf], twin)
            yield twins
        finally:
            for leaf in twins:
                put(self.model, self.places[leaf], leaf)


def _shown(leaves: list[Leaf]) -> str:
    return ", ".join(leaf.path for leaf in leaves[:3]) + (", ..." if len(leaves) > 3 else "")


def is_sequential(leaf: Leaf) -> bool:
    """Whether its method wants the inputs of each layer after those before it in the block are rounded."""
    notes = [peek_meta(node).get("weight", {}) for node in leaf.inner.graph.nodes]  # type: ignore[union-attr]
    return any(parse_algorithm(n["algorithm"])[1].get("true_sequential") for n in notes if n)
