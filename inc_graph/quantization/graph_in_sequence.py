"""The calls that a prepared graph has kept, computed when it is converted: its layers are rounded in sequence.

See `inc_graph.in_sequence`. Where the calls would hold too much while they wait for each other, they wait in a
temporary file. If there is no room for that either, they run through the float graph one after the other, and each
layer is rounded on its inputs there.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from inc_graph.aside import Aside
from inc_graph.errors import IncWarning
from inc_graph.graph import clone, peek_meta
from inc_graph.in_sequence import IN_SEQUENCE, InSequence
from inc_graph.quantization.kept_calls import LIMIT, KeptCalls, flat_inputs, run_kept

__all__ = ["IN_FLOAT", "begin", "layers_in"]

IN_FLOAT = "layers were rounded on their inputs in the float model, not on what the rounded ones before them give"


def layers_in(gm: fx.GraphModule) -> int:
    """How many layers with quantized weights a graph has: steps of the progress that `begin` tells."""
    return sum("weight" in peek_meta(n) for n in gm.graph.nodes)


@dataclass
class _Flat:
    """The kept calls, each as a value for each placeholder."""

    gm: fx.GraphModule
    kept: KeptCalls

    def __iter__(self) -> Iterator[list[Any]]:
        return (flat_inputs(self.gm, *call) for call in self.kept.each())


def begin(gm: fx.GraphModule, kept: KeptCalls | None, step: Callable[[str], None]) -> InSequence | str:
    """Have the layers of an observed graph rounded in sequence by the pass that converts it.

    Args:
        gm: A copy for that pass, which keeps no calls.
        kept: Of the prepared graph.
        step: Told of each layer.

    Returns:
        What the pass will ask; or why layers are rounded on their inputs in the float model, which are known then. ""
        if no layer needs its inputs.
    """
    if kept is None or kept.reason or not kept.calls:
        return "" if kept is None else kept.reason
    sequence = InSequence(clone(gm), _Flat(gm, kept), step, kept.aside)
    size, room = sequence.calls.waiting_bytes(), shutil.disk_usage(tempfile.gettempdir()).free
    if size <= LIMIT or size < room:
        if size > LIMIT and kept.aside is None:
            sequence.calls.put_aside(Aside())
        gm.meta[IN_SEQUENCE] = sequence
        return sequence
    del sequence
    run_kept(gm, kept)
    where = f"there are {room / 2**30:.1f} for temporary files in {tempfile.gettempdir()}"
    reason = f"calls that wait for each other would hold {size / 2**30:.1f} GiB, and {where}"
    warnings.warn(f"{IN_FLOAT}: {reason}", IncWarning, stacklevel=4)
    return reason
