"""The converted model: runs its lowered form, holds its Q-DQ graph."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import fx, nn

from inc_graph.capture import own_mutated
from inc_graph.errors import IncError
from inc_graph.graph import clone, get_attr, peek_meta
from inc_graph.quantization.cut_gradients import Cut
from inc_graph.quantization.decisions import Decisions, decisions_of
from inc_graph.quantization.moving import Once, moved
from inc_graph.quantization.pickling import NotPickled
from inc_graph.quantization.saved import destination, device_of, save_graph
from inc_graph.quantization.state import load_tensors
from inc_graph.report import Report, attribute_bytes
from inc_graph.smooth_report import smooth_lines
from inc_graph.utils.device import choose_backend

__all__ = ["QuantizedModel", "all_or_nothing"]


_ELSEWHERE = "inc_graph.quantization saves and loads such a model"


class QuantizedModel(nn.Module):
    """Result of `convert`: called like the float model.

    Weights are kept once, in the form that the backend's kernels read (a table tied to an output head in two: rows to
    look up, and packed). `graph` gives the device-agnostic Q-DQ graph back: what is packed is unpacked at that moment,
    other tensors are shared. It can be copied and saved (`save`), and not be pickled.

    A model whose kernels hold weights in a layout of their own (`fixed`) stays on its device, in its dtypes and in eval
    mode. Any other one, with weights quantized only, goes where `to`, `half`, ... want it: biases, inputs and what is
    computed follow, codes and scales keep their dtype, and the graph is lowered anew. Gradients flow through it to its
    inputs, in train mode as well; what it computes does not depend on the mode.

    Args:
        qdq: Taken over: not to be used by anyone else afterwards. Need not be recompiled.
        lowered: What a backend made of it.
        packed, for_compile: See `inc_graph.lowering.base.Lowered.packed` and `Backend.for_compile`.

    Attributes:
        report: What was quantized, what runs in which kernel, what stayed float and why.
        backend: Name of the backend that `forward` runs on.
    """

    assemble: ClassVar[Callable[..., QuantizedModel]]
    """`finish.assemble`, which makes these models; a model that has moved is lowered by it once more."""

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
        report.smoothing = smooth_lines(qdq)
        self.backend = report.backend
        self._packed = packed
        for name in packed:
            qdq.register_buffer(name, torch.empty(0, dtype=torch.int8))  # stands for what the backend has packed
        self._qdq = [qdq]  # not a submodule: its tensors are those of the lowered graph, or packed in it
        self.lowered = lowered
        self._for_compile = [for_compile or lowered]  # the same tensors once more: not a submodule either
        self._cut = Cut.of(qdq)
        self._home = (torch.device(device_of(qdq)).type, self.backend)  # what was asked for, and where
        self.eval()

    within = ""
    """Name in the layer that holds it, with a dot, which the names of its tensors leave out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, computed by the backend."""
        if torch.compiler.is_dynamo_compiling():
            return self._for_compile[0](*args, **kwargs)
        out = self.lowered(*args, **kwargs)
        return out if self._cut is None else self._cut.marked(out, (args, kwargs))

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

    def _whole(self) -> fx.GraphModule:
        """The Q-DQ graph with all of its tensors: what a backend has laid out anew is brought back."""
        return self.graph if self._packed else self._qdq[0]

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

    @property
    def fixed(self) -> bool:
        """Whether kernels hold something that can follow neither to another device nor to another dtype."""
        reads = self.lowered.graph.find_nodes(op="get_attr")
        known = torch.Tensor | nn.Module
        return not all(isinstance(get_attr(self.lowered, str(n.target)), known) for n in reads)

    def train(self, mode: bool = True) -> QuantizedModel:
        """The mode changes nothing that is computed. `train(True)` is refused where kernels hold packed weights."""
        if mode and self.fixed:
            raise _no_training()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedModel:
        """What `to`, `half` and `cuda` go through. A `fixed` model takes what changes neither dtype nor device."""
        if self.fixed:
            self.check_move(fn)
            return super()._apply(fn, recurse)
        self.check_move(fn)
        qdq = moved(self._whole(), fn if isinstance(fn, Once) else Once(fn))
        if qdq is not None:
            self._lower(qdq)
        return self

    def check_move(self, fn: Callable[..., Any]) -> None:
        """IncError if `fn`, which `_apply` would give each tensor, changes the dtype or device of a `fixed` model, or a
        dtype of one in mixed precision."""
        if any("half" in peek_meta(n) for n in self._qdq[0].graph.nodes):
            probe = torch.empty(1, device=device_of(self._qdq[0]))
            if (dtype := fn(probe).dtype) != probe.dtype:
                hint = "convert the float model with another dtype"
                raise IncError(f"a model in mixed precision keeps its dtypes: it cannot go to {dtype}", hint=hint)
        if not self.fixed:
            return
        own = next((t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()), torch.empty(0))
        probe = own.new_empty(1)
        there = fn(probe)
        if (there.dtype, there.device) != (probe.dtype, probe.device):
            change = f"{probe.dtype} on {probe.device} to {there.dtype} on {there.device}"
            hint = "move the float model, then quantize it there"
            raise IncError(f"a converted model cannot go from {change}", hint=hint)

    def _lower(self, qdq: fx.GraphModule) -> None:
        """Become the model of another Q-DQ graph: the same operators, other tensors."""
        home, backend = self._home
        place = torch.device(device_of(qdq)).type
        if place != home:  # on "meta" there is nothing that a kernel could read
            backend = "eager" if place == "meta" else choose_backend("auto", place)[0]
        trained = {name for name, p in self.lowered.named_parameters() if p.requires_grad}
        timings = [t for t in self.report.timings if t[0] != "lower"]
        new = type(self).assemble(qdq, backend, self.report.method, timings, self.report.bytes_before)
        new.report.notes = self.report.notes
        self.report.__dict__.update(new.report.__dict__)
        for name, parameter in new.lowered.named_parameters():
            parameter.requires_grad_(name in trained)
        self.lowered = new.lowered.train(self.training)
        self._qdq, self._for_compile, self._packed, self.backend = new._qdq, new._for_compile, new._packed, new.backend

    def share(self, other: QuantizedModel) -> bool:
        """Take the codes and scales of another model for one's own; False, and nothing done, if they are not equal.

        Other tensors may differ: of two layers with one weight each keeps its bias. The weight is the largest tensor.
        """
        ours, theirs = (dict(m._qdq[0].named_buffers()) for m in (self, other))
        if self.fixed or other.fixed or self._packed or other._packed or not ours:
            return False
        equal = {n: b for n, b in theirs.items() if n in ours and b.dtype == ours[n].dtype and torch.equal(ours[n], b)}
        weights = [max(tensors, key=lambda n: tensors[n].nbytes) for tensors in (ours, theirs)]
        codes = [{n for n, t in tensors.items() if not t.is_floating_point()} for tensors in (ours, theirs)]
        same = weights[0] in equal and weights[0] == weights[1] and codes[0] == codes[1] and codes[0] <= set(equal)
        if same:
            qdq, *_ = load_tensors(self._qdq[0], {**ours, **equal}, assign=True)
            assert qdq is not None
            self._lower(qdq)
        return same

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Tensors by the names that the Q-DQ graph has for them; of a `fixed` model those that are not packed."""
        if self.fixed:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        graph = self._whole()
        return nn.Module.state_dict(graph, *args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.fixed:
            if strict:  # torch would say that all keys match
                missing_keys.append(f"{prefix.removesuffix(self.within)}weight (packed for this machine: {_ELSEWHERE})")
            lists = (missing_keys, unexpected_keys, error_msgs)
            return super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        own = {k[len(prefix) :]: state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        qdq, missing, unexpected, errors = load_tensors(self._whole(), own, assign)
        shown = prefix.removesuffix(self.within)
        missing_keys += [shown + k for k in missing]
        unexpected_keys += [shown + k for k in unexpected]
        error_msgs += [f"{shown}{text}" for text in errors]
        if qdq is not None:
            self._lower(qdq)
        # torch goes on with `lowered`, which is done
        state_dict.update({f"{prefix}lowered.{k}": t for k, t in self.lowered.state_dict().items()})

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
        int8 = all(line.detail.removeprefix("fused into ").startswith("int8 ") for line in r.kernels)
        where = "int8 kernels" if int8 else "kernels"
        return f"{r.method} on {r.backend}: {len(r.kernels)} operators in {where}, {len(r.floats)} float"


def _no_training() -> IncError:
    return IncError("a converted model cannot be trained", hint="train the float model, then quantize it again")


# ------------------------------------------------------------------------------- models that hold quantized layers
def all_or_nothing(model: nn.Module) -> None:
    """Let `train`, `to`, `half`, ... of a model, or of a part of it, ask its `QuantizedModel`s before anything changes.

    Some of them refuse; their siblings would be in another dtype by then, and the model would not run any more. The
    report of the model is kept true, too. What they say of gradients is said once.
    """
    cuts = [m._cut for m in model.modules() if isinstance(m, QuantizedModel) and m._cut is not None]
    for cut in cuts:
        cut.told = cuts[0].told
    for module in model.modules():
        if not isinstance(module, QuantizedModel) and any(isinstance(m, QuantizedModel) for m in module.modules()):
            own: list[tuple[str, Callable[..., Any]]] = [
                ("train", _train),
                ("_apply", _apply_to_all),
                ("load_state_dict", _load),
            ]
            own += [("save_pretrained", _no_save_pretrained)] if hasattr(type(module), "save_pretrained") else []
            own += [("tie_weights", _keep_tied)] if hasattr(type(module), "tie_weights") else []
            for name, method in own:
                module.__dict__.setdefault(name, types.MethodType(method, module))


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    if mode and any(m.fixed for m in self.modules() if isinstance(m, QuantizedModel)):
        raise _no_training()
    return type(self).train(self, mode)


def _apply_to_all(self: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    with _telling(self) as inside:
        for module in inside if recurse else ():
            module.check_move(fn)
        return type(self)._apply(self, fn if isinstance(fn, Once) else Once(fn), recurse)


def _load(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _telling(self):
        return type(self).load_state_dict(self, *args, **kwargs)


def _no_save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """transformers would write a folder whose layers `from_pretrained` does not find, and fills with random numbers."""
    hint = "model.save(folder), or inc_graph.quantization.save(model, folder); load(folder, float_model) reads it"
    raise IncError("save_pretrained cannot write quantized layers", hint=hint)


def _keep_tied(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """A quantized table or head shares its codes or does not: no weight of it could be set."""
    ends = [getattr(self, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    if not any(isinstance(m, QuantizedModel) for end in ends if end is not None for m in end.modules()):
        kind: Any = type(self)
        kind.tie_weights(self, *args, **kwargs)


@contextlib.contextmanager
def _telling(model: nn.Module) -> Iterator[list[QuantizedModel]]:
    """The quantized layers; the report of the model is written anew if one of them is lowered anew."""
    inside = [m for m in model.modules() if isinstance(m, QuantizedModel)]
    before = [m.lowered for m in inside]
    yield inside
    report = next(
        (r for n in ("quantization_report", "report") if isinstance(r := model.__dict__.get(n), Report)), None
    )
    if report is not None and any(m.lowered is not old for m, old in zip(inside, before, strict=True)):
        report.backend = inside[0].backend
        report.kernels = [line for m in inside for line in m.report.kernels]
        report.reference = [line for m in inside for line in m.report.reference]
        report.bytes_after = attribute_bytes(model)
