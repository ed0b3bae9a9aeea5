"""The converted model: runs its lowered form, holds its Q-DQ graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from inc_graph.capture import own_mutated
from inc_graph.errors import IncError
from inc_graph.graph import clone
from inc_graph.report import Report

__all__ = ["QuantizedModel"]


class QuantizedModel(nn.Module):
    """Result of `convert`: called like the float model.

    Weights are kept once, in the form that the backend's kernels read. `graph` gives the device-agnostic Q-DQ graph
    back: what is packed is unpacked at that moment, other tensors are shared. The model stays on its device, in its
    dtypes and in eval mode: kernels hold constants that cannot follow.

    Attributes:
        report: What was quantized, what runs in which kernel, what stayed float and why.
        backend: Name of the backend that `forward` runs on.
    """

    def __init__(
        self,
        qdq: fx.GraphModule,
        lowered: fx.GraphModule,
        report: Report,
        packed: dict[str, Callable[[], torch.Tensor]],
        for_compile: nn.Module | None = None,
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
        self._for_compile = [for_compile or lowered]  # the same tensors once more: not a submodule either
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, computed by the backend."""
        graph = self._for_compile[0] if torch.compiler.is_dynamo_compiling() else self.lowered
        return graph(*args, **kwargs)

    @property
    def graph(self) -> fx.GraphModule:
        """The Q-DQ graph as a graph module of its own that runs on the reference implementation."""
        gm = clone(self._qdq[0])
        own_mutated(gm)
        for name, codes in self._packed.items():
            gm.register_buffer(name, codes())
        return gm

    def train(self, mode: bool = True) -> QuantizedModel:
        """A converted model is for inference; `train(True)` is refused."""
        if mode:
            raise IncError("a converted model cannot be trained", hint="train the float model, then quantize it again")
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedModel:
        """What `to`, `half` and `cuda` go through: only what changes neither dtype nor device."""
        own = next((t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()), torch.empty(0))
        probe = own.new_empty(1)
        there = fn(probe)
        if (there.dtype, there.device) != (probe.dtype, probe.device):
            change = f"{probe.dtype} on {probe.device} to {there.dtype} on {there.device}"
            hint = "move the float model, then quantize it there"
            raise IncError(f"a converted model cannot go from {change}", hint=hint)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        r = self.report
        return f"{r.method} on {r.backend}: {len(r.kernels)} operators in int8 kernels, {len(r.floats)} float"
