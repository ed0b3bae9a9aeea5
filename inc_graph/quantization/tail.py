"""What stands behind the blocks of a model, run on what the last block gives.

The blocks were computed one by one, so the model's call goes through without them: each gives something in their place,
the last one what it has really given. That is right if nobody reads what the others give. Whether somebody does was
seen when the calls were kept: then they run through all rounded blocks instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from inc_graph.aside import Kept
from inc_graph.gram import GramObserver
from inc_graph.quantization.block_inputs import BlockInputs, grams
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
    """Let the layers behind the blocks see their inputs, and nothing that they have seen before.

    Args:
        model: Prepared; its blocks are rounded.
        inputs: The calls, and what is known of the blocks.
        hidden: What the last block gives, for each call.
        places: Every leaf with its paths.
        done: Leaf -> its rounded form.
    """
    tail = [leaf for leaf in places if leaf.path in inputs.behind]
    for observer in (o for leaf in tail for o in grams(leaf)):
        observer.reset()
    with _watching(places, tail):
        if not inputs.reads_all:
            stubs = _Stubs(model, inputs)
            with stubs.placed():
                for i in range(len(inputs.calls)):
                    stubs.last = hidden[i]
                    _call(model, inputs, i)
            return
        blocks = [leaf for leaf, paths in places.items() if inputs.holds(paths)]
        try:
            for leaf in blocks:
                put(model, places[leaf], done.get(leaf, leaf))
            for i in range(len(inputs.calls)):
                _call(model, inputs, i)
        finally:
            for leaf in blocks:
                put(model, places[leaf], leaf)


def _call(model: nn.Module, inputs: BlockInputs, i: int) -> None:
    with torch.no_grad():
        inputs.calls[i].again(model, inputs)


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
        last: What the last block gives; the others give something of its shape.
    """

    def __init__(self, model: nn.Module, inputs: BlockInputs) -> None:
        self.blocks = [model.get_submodule(path) for path in inputs.paths]
        self.forms, self.last = inputs.forms, torch.empty(0)

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        before = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for i, block in enumerate(self.blocks):
                block.__dict__["forward"] = lambda *args, i=i, **kwargs: self._give(i)
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                del block.__dict__["forward"]
                if own is not None:
                    block.__dict__["forward"] = own

    def _give(self, i: int) -> Any:
        value = self.last.clone() if i == len(self.blocks) - 1 else torch.full_like(self.last, torch.nan)
        return self.forms[i].holding(value)
