"""What stands behind the blocks of a model, run on what the last block gives.

The blocks were computed one by one, so the model's call goes through without them: each gives something in their place,
the last one what it has really given. That is right if nobody reads what the others give. Whether somebody does is seen
in one call: does anything change if they give something else? Then the calls run through all rounded blocks instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.aside import Kept
from inc_graph.gram import GramObserver
from inc_graph.quantization.block_inputs import BlockInputs, copies, grams
from inc_graph.quantization.layers import put
from inc_graph.quantization.leaf import Leaf

__all__ = ["run_tail"]


def run_tail(
    model: nn.Module,
    inputs: BlockInputs,
    hidden: Kept,
    places: Mapping[Leaf, list[str]],
    done: Mapping[Leaf, Leaf],
) -> None:
    """Let the layers that have seen nothing yet see their inputs.

    Args:
        model: Prepared; its blocks are rounded.
        inputs: The calls, and what is known of the blocks.
        hidden: What the last block gives, for each call.
        places: Every leaf with its paths.
        done: Leaf -> its rounded form.
    """
    tail = [leaf for leaf in places if any(not o.elements for o in grams(leaf))]
    with _watching(places, tail):
        stubs = _Stubs(model, inputs)
        if _reads_the_last_alone(model, inputs, stubs, tail, hidden[0]):
            with stubs.placed():
                for i in range(len(inputs.calls)):
                    stubs.last = hidden[i]
                    _call(model, inputs, i)
            return
        blocks = [leaf for leaf, paths in places.items() if any(p.startswith(f"{b}.") for p in paths
                                                                 for b in inputs.paths)]  # fmt: skip
        try:
            for leaf in blocks:
                put(model, places[leaf], done.get(leaf, leaf))
            for i in range(len(inputs.calls)):
                _call(model, inputs, i)
        finally:
            for leaf in blocks:
                put(model, places[leaf], leaf)


def _call(model: nn.Module, inputs: BlockInputs, i: int) -> None:
    own = model.__dict__["_inc_forward"] or type(model).forward.__get__(model)
    whole = inputs.calls[i].whole
    assert whole is not None
    args, kwargs = copies(whole)
    with torch.no_grad():
        own(*args, **kwargs)


@contextlib.contextmanager
def _watching(places: Mapping[Leaf, list[str]], tail: list[Leaf]) -> Iterator[None]:
    """Only the observers of the tail take in what they see."""
    all_of_them: list[tuple[GramObserver, bool]] = [(o, o.enabled) for leaf in places for o in grams(leaf)]
    wanted = {o for leaf in tail for o in grams(leaf) if not o.elements}
    try:
        for observer, _ in all_of_them:
            observer.enabled = observer in wanted
        yield
    finally:
        for observer, enabled in all_of_them:
            observer.enabled = enabled


class _Stubs:
    """What the blocks compute, replaced: they keep their class and attributes.

    Attributes:
        last: What the last block gives.
        fill: What the others give is filled with it, in the shape of `last`.
    """

    def __init__(self, model: nn.Module, inputs: BlockInputs) -> None:
        self.blocks = [model.get_submodule(path) for path in inputs.paths]
        self.tuples, self.fill, self.last = inputs.tuples, 0.0, torch.empty(0)

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        before = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.__dict__["forward"] = lambda *args, block=block, **kwargs: self._give(block)
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                del block.__dict__["forward"]
                if own is not None:
                    block.__dict__["forward"] = own

    def _give(self, block: nn.Module) -> Any:
        value = self.last.clone() if block is self.blocks[-1] else torch.full_like(self.last, self.fill)
        return (value,) if self.tuples else value


def _reads_the_last_alone(
    model: nn.Module, inputs: BlockInputs, stubs: _Stubs, tail: list[Leaf], hidden: Tensor
) -> bool:
    """Whether the layers of the tail see the same whatever the blocks before the last one give."""
    seen: list[Tensor] = []
    observers = [o for leaf in tail for o in grams(leaf)]
    enabled = [o.enabled for o in observers]
    hooks = [
        leaf.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone())) for leaf in tail
    ]
    stubs.last = hidden
    runs = []
    try:
        for observer in observers:
            observer.enabled = False
        with stubs.placed():
            for fill in (0.25, -1.5):
                stubs.fill = fill
                _call(model, inputs, 0)
                runs.append(list(seen))
                seen.clear()
    except Exception:  # of values that nobody has ever seen; the whole model says it again if there is something wrong
        return False
    finally:
        for hook in hooks:
            hook.remove()
        for observer, value in zip(observers, enabled, strict=True):
            observer.enabled = value
    first, second = runs
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )
