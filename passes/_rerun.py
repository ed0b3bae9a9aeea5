"""Calibration data once more, through a graph that was rewritten after it had seen the data.

The calls ride in the `meta` of the graph under `CALLS`: a list with a value for each placeholder, for each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.calibrate import Observer
from inc_graph.gram import GramObserver
from inc_graph.graph import get_tensor, mutated_attrs, written_args
from inc_graph.input_mean import MeanObserver

__all__ = ["rerun"]


def rerun(gm: fx.GraphModule, calls: Sequence[Sequence[Any]], *, ranges_only: bool = False, grams: bool = True) -> None:
    """Run calls through an observed graph; buffers that it writes to are as before afterwards.

    Args:
        calls: A value for each placeholder, for each call.
        ranges_only: Only range observers look.
        grams: Whether outer products are collected.
    """
    deaf = [m for m in gm.modules() if isinstance(m, GramObserver) and (ranges_only or not grams)]
    deaf += [m for m in gm.modules() if isinstance(m, MeanObserver) and ranges_only]  # type: ignore[misc]
    buffers: dict[str, Tensor] = {name: get_tensor(gm, name).clone() for name in mutated_attrs(gm)}
    for module in gm.modules():
        if isinstance(module, Observer | MeanObserver | GramObserver):
            module.enabled = module not in deaf
    runner = _Runner(gm)
    try:
        with torch.no_grad():
            for call in calls:
                runner.run(*call, enable_io_processing=False)
    finally:
        for module in deaf:
            module.enabled = True
        for name, value in buffers.items():
            get_tensor(gm, name).copy_(value)


class _Runner(fx.Interpreter):
    """Computes what observers look at, and what is written to buffers; not the output head of a language model."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        todo = [n for n in gm.graph.nodes if n.op == "call_module" or written_args(n)]
        self.needed = set(todo)
        while todo:
            new = [n for n in todo.pop().all_input_nodes if n not in self.needed]
            self.needed.update(new)
            todo += new

    def run_node(self, n: fx.Node) -> Any:
        return super().run_node(n) if n in self.needed or n.op == "placeholder" else None
