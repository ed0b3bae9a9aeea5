"""What stands before the blocks of a model, run once more when it is rounded: what they are then calibrated on.

An encoder whose output the blocks of a decoder read, a projection of embeddings, a tower for images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from inc_graph.quantization.block_inputs import BlockInputs, Call, not_watching
from inc_graph.quantization.chain import Chain
from inc_graph.quantization.hidden_runs import unseen
from inc_graph.quantization.layers import put
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.without_values import Stop

__all__ = ["calls_behind", "rounded_before"]


def calls_behind(
    model: nn.Module, inputs: BlockInputs, places: Mapping[Leaf, list[str]], done: Mapping[Leaf, Leaf]
) -> list[Call]:
    """The calls of the first block as they are when what is called before it is rounded.

    Args:
        model: Prepared.
        inputs: The calls as they were in the float model; they stay what they are.
        places: Every leaf with its paths.
        done: Leaf -> its rounded form.

    Raises:
        CalibrationError: what comes into the first block is not finite now.
    """
    if not any(leaf.path in inputs.before and leaf in done for leaf in places):
        return inputs.calls
    new = BlockInputs(inputs.paths, aside=inputs.aside)
    first = model.get_submodule(inputs.paths[0])
    with rounded_before(model, inputs, places, done), not_watching(model), unseen(model), torch.no_grad():
        for number, call in enumerate(inputs.calls, 1):
            chain = Chain(inputs.paths, number)

            def enter(module: nn.Module, args: object, kwargs: object, chain: Chain = chain) -> None:
                chain.enter(0, args, kwargs)  # type: ignore[arg-type]
                raise Stop("nothing behind it is wanted")

            hook = first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            try:
                with contextlib.suppress(Stop):
                    call.again(model, inputs)
            finally:
                hook.remove()
            if chain.first is None:  # its way depends on values, and is another one now
                return inputs.calls
            new.keep(*chain.first, call.whole, call.entry)
    return new.calls


@contextlib.contextmanager
def rounded_before(
    model: nn.Module, inputs: BlockInputs, places: Mapping[Leaf, list[str]], done: Mapping[Leaf, Leaf]
) -> Iterator[None]:
    """Within, the layers that are called before the blocks are rounded."""
    leaves = [leaf for leaf in places if leaf.path in inputs.before and leaf in done]
    try:
        for leaf in leaves:
            put(model, places[leaf], done[leaf])
        yield
    finally:
        for leaf in leaves:
            put(model, places[leaf], leaf)
