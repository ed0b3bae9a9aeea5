"""The converted model: runs its lowered form, holds its Q-DQ graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from inc_graph.graph import clone
from inc_graph.report import Report

__all__ = ["QuantizedModel"]


class QuantizedModel(nn.Module):
    """Result of `convert`: called like the float model.

    Weights are kept once, in the form that the backend's kernels read. `graph` gives the device-agnostic Q-DQ graph back; its
    weights are unpacked at that moment and belong to the caller.

    Attributes:
        report: What was quantized, what runs in which kernel, what stayed float and why.
        backend: Name of the backend that `forward` runs on.
    """

    def __init__(
        self, qdq: fx.GraphModule, lowered: fx.GraphModule, report: Report, packed: dict[str, Callable[[], torch.Tensor]]
    ) -> None:
        super().__init__()
        self.report = report
        self.backend = report.backend
        self._packed = packed
        skeleton = clone(qdq)
        for name in packed:
            skeleton.register_buffer(name, torch.empty(0, dtype=torch.int8))  # stands for what the backend has packed
        self._qdq = [skeleton]  # not a submodule: its tensors are those of the lowered graph, or packed in it
        self.lowered = lowered
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, computed by the backend."""
        return self.lowered(*args, **kwargs)

    @property
    def graph(self) -> fx.GraphModule:
        """The Q-DQ graph as a graph module of its own that runs on the reference implementation."""
        gm = clone(self._qdq[0])
        for name, codes in self._packed.items():
            gm.register_buffer(name, codes())
        return gm

    def train(self, mode: bool = True) -> QuantizedModel:
        """A converted model is for inference; `train(True)` is refused."""
        if mode:
            from inc_graph.errors import IncError

            raise IncError("a converted model cannot be trained", hint="train the float model, then quantize it again")
        return super().train(False)

    def extra_repr(self) -> str:
        r = self.report
        return f"{r.method} on {r.backend}: {len(r.kernels)} operators in int8 kernels, {len(r.floats)} float"
