"""Prepared and converted models are not pickled: fx saves the generated code of a graph and drops what it means.

Annotations, the recipe and fake values are metadata of the graph, and they would be gone without a word. A mark in the
metadata, which copies carry over, refuses instead.
"""

from __future__ import annotations

import pickle
from typing import Any

from torch import fx

from inc_graph.errors import LoweringError

__all__ = ["NotPickled", "refuse_pickling"]


class NotPickled(LoweringError, pickle.PicklingError):
    """A prepared or converted model was to be pickled."""

    def __init__(self, what: str) -> None:
        hint = (
            "inc_graph.quantization.save(q_model, folder) saves a converted model, without pickle; a prepared one is "
            "made again from the float model and the calibration data"
        )
        super().__init__(f"{what} cannot be pickled: what was decided and measured would be lost", hint=hint)


class _Mark:
    def __copy__(self) -> _Mark:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotPickled("a prepared or quantized graph")


def refuse_pickling(gm: fx.GraphModule) -> None:
    """From now on pickling `gm`, a copy of it or what is made of it raises `NotPickled`."""
    gm.meta["inc_not_pickled"] = _Mark()
