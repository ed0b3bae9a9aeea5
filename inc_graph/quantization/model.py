"""The converted model: runs its lowered form, holds its Q-DQ graph."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from inc_graph.capture import own_mutated
from inc_graph.errors import IncError
from inc_graph.graph import clone
from inc_graph.quantization.decisions import Decisions, decisions_of
from inc_graph.quantization.pickling import NotPickled
from inc_graph.quantization.saved import destination, save_graph
from inc_graph.report import Report

__all__ = ["QuantizedModel", "all_or_nothing"]


class QuantizedModel(nn.Module):
    """Result of `convert`: called like the float model.

    Weights are kept once, in the form that the backend's kernels read (a table tied to an output head in two: rows to
    look up, and packed). `graph` gives the device-agnostic Q-DQ graph back: what is packed is unpacked at that moment,
    other tensors are shared. The model stays on its device, in its dtypes and in eval mode: kernels hold constants that
    cannot follow. It can be copied and saved (`save`), and not be pickled.

    Args:
        qdq: Taken over: not to be used by anyone else afterwards. Need not be recompiled.
        lowered: What a backend made of it.
        packed, for_compile: See `inc_graph.lowering.base.Lowered.packed` and `Backend.for_compile`.

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
        if "recipe" in qdq.meta.get("inc", {}):
            report.recipe = decisions_of(qdq)
        self.backend = report.backend
        self._packed = packed
        for name in packed:
            qdq.register_buffer(name, torch.empty(0, dtype=torch.int8))  # stands for what the backend has packed
        self._qdq = [qdq]  # not a submodule: its tensors are those of the lowered graph, or packed in it
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
        gm.recompile()
        return gm

    @property
    def recipe(self) -> Decisions:
        """For every operator which rule of the config gave it which method; print it."""
        found: Decisions = self.report.recipe
        return found

    def parts(self) -> tuple[fx.GraphModule, dict[str, Callable[[], torch.Tensor]]]:
        """(Q-DQ graph, {attribute: function that gives its codes}): what is packed is a placeholder in the graph."""
        return self._qdq[0], self._packed

    def save(self, checkpoint_dir: Any = "saved_results", format: Any = "default", **options: Any) -> None:
        """Write the model to a folder that `inc_graph.quantization.load` reads, without the float model and its code.

        Args:
            checkpoint_dir: The folder. What was saved there before is replaced in one step.
            format: "default".
            options: `max_shard_size`: bytes of a file of tensors, as a number or such as "2GB".

        Raises:
            SavedModelError: the folder cannot be written, or a part of the graph has no form in a file.
        """
        where, limit = destination(checkpoint_dir, format, options)
        save_graph(self, where, limit)

    def train(self, mode: bool = True) -> QuantizedModel:
        """A converted model is for inference; `train(True)` is refused."""
        if mode:
            raise _no_training()
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedModel:
        """What `to`, `half` and `cuda` go through: only what changes neither dtype nor device."""
        self.check_move(fn)
        return super()._apply(fn, recurse)

    def check_move(self, fn: Callable[..., Any]) -> None:
        """IncError if `fn`, which `_apply` would give each tensor, changes dtype or device."""
        own = next((t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()), torch.empty(0))
        probe = own.new_empty(1)
        there = fn(probe)
        if (there.dtype, there.device) != (probe.dtype, probe.device):
            change = f"{probe.dtype} on {probe.device} to {there.dtype} on {there.device}"
            hint = "move the float model, then quantize it there"
            raise IncError(f"a converted model cannot go from {change}", hint=hint)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return new

    def __copy__(self) -> QuantizedModel:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotPickled("a converted model")

    def extra_repr(self) -> str:
        r = self.report
        return f"{r.method} on {r.backend}: {len(r.kernels)} operators in int8 kernels, {len(r.floats)} float"


def _no_training() -> IncError:
    return IncError("a converted model cannot be trained", hint="train the float model, then quantize it again")


# ------------------------------------------------------------------------------- models that hold quantized layers
def all_or_nothing(model: nn.Module) -> None:
    """Let `train`, `to`, `half`, ... of a model, or of a part of it, ask its `QuantizedModel`s before anything changes.

    A part of them refuses; its siblings would be in another dtype by then, and the model would not run any more.
    """
    for module in model.modules():
        if not isinstance(module, QuantizedModel) and any(isinstance(m, QuantizedModel) for m in module.modules()):
            for name, method in (("train", _train), ("_apply", _apply_to_all)):
                module.__dict__.setdefault(name, types.MethodType(method, module))


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise _no_training()
    return type(self).train(self, mode)


def _apply_to_all(self: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    for module in self.modules() if recurse else ():
        if isinstance(module, QuantizedModel):
            module.check_move(fn)
    return type(self)._apply(self, fn, recurse)
