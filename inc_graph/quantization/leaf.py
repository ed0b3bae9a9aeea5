"""Module scope: a model that cannot be exported as a whole is quantized layer by layer.

Each leaf (Linear, Conv*, Embedding, the Conv1D of HF transformers) becomes a small captured graph in place, on which the same
passes and lowerings run; the model keeps its class, its methods and its Python control flow. Functional calls
(`torch.matmul`, `+`) are not seen here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.calibrate import Observer
from inc_graph.capture import capture
from inc_graph.errors import CalibrationError, ConfigError, IncWarning, UnusedRuleWarning
from inc_graph.graph import clone
from inc_graph.passmanager import Pipeline
from inc_graph.quantization.finish import finish
from inc_graph.quantization.model import QuantizedModel
from inc_graph.recipe import Recipe, set_recipe
from inc_graph.report import OpLine, Report, attribute_bytes, read_graph

__all__ = ["Leaf", "convert", "is_prepared", "prepare"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Leaf(nn.Module):
    """Stands where a layer stood. Inputs of any rank that the layer takes are brought to the rank its graph was captured at.

    What the layer has and this has not (`weight`, `in_features`) is looked up in the layer, while it is kept.
    """

    def __init__(self, inner: nn.Module, kind: str, rank: int, path: str, original: nn.Module | None, facts: dict[str, Any]):
        super().__init__()
        self.inner, self.kind, self.rank, self.path = inner, kind, rank, path
        self.facts = facts
        self._original = (original,)  # a tuple: not a submodule, so its parameters are not counted twice

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rows":  # linear: every dimension but the last is a row
            shape = x.shape
            return self.inner(x.reshape(-1, shape[-1])).reshape(*shape[:-1], -1)
        if self.kind == "index":
            return self.inner(x.reshape(-1)).reshape(*x.shape, -1)
        if x.ndim == self.rank - 1:  # an unbatched image
            return self.inner(x[None])[0]
        return self.inner(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_original", "facts"):
                raise
            if self._original[0] is not None:
                return getattr(self._original[0], name)
            if name in self.facts:
                return self.facts[name]
            raise

    def extra_repr(self) -> str:
        return self.path


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Embedding, *_CONVS)) or _is_hf_conv1d(module):
            yield path, module


def _is_hf_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _example(module: nn.Module) -> tuple[Tensor, str, int, Any]:
    """(example input, kind, rank, dynamic dimensions)."""
    dynamic = torch.export.Dim.DYNAMIC
    weight = module.weight
    if isinstance(module, nn.Embedding):
        return torch.zeros(6, dtype=torch.long, device=weight.device), "index", 1, {0: dynamic}  # type: ignore[union-attr,arg-type]
    make = {"dtype": weight.dtype, "device": weight.device}
    if isinstance(module, _CONVS):
        space = [max(16, d * (k - 1) + 2) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        shape = [2, module.in_channels, *space]
        return torch.zeros(shape, **make), "space", len(shape), dict.fromkeys([0, *range(2, len(shape))], dynamic)  # type: ignore[arg-type]
    inputs = module.in_features if isinstance(module, nn.Linear) else weight.shape[0]  # type: ignore[union-attr]
    return torch.zeros(6, inputs, **make), "rows", 2, {0: dynamic}  # type: ignore[arg-type]


class _Captures:
    """One export for all layers of one form: the graphs differ in their tensors only."""

    def __init__(self) -> None:
        self.known: dict[Any, fx.GraphModule] = {}

    def get(self, module: nn.Module, path: str, example: Tensor, dims: Any) -> fx.GraphModule:
        tensors = {n: (tuple(t.shape), t.dtype, t.device) for n, t in module.named_parameters()}
        key = (type(module), repr(module), tuple(sorted(tensors.items(), key=str)))
        if key not in self.known:
            self.known[key] = capture(module, (example,), dynamic_shapes=(dims,))
        gm = clone(self.known[key])
        for name, tensor in module.named_parameters():
            if hasattr(gm, name):
                gm._parameters.pop(name, None)
                gm.register_parameter(name, tensor)  # type: ignore[arg-type]
        stack = {path: (path, type(module))}
        for node in gm.graph.nodes:
            node.meta["nn_module_stack"] = stack
        gm._forward_pre_hooks.clear()
        gm._forward_pre_hooks_with_kwargs.clear()
        return gm


def prepare(model: nn.Module, recipe: Recipe, inplace: bool) -> nn.Module:
    """Replace each leaf that the recipe quantizes by its observed graph. All or nothing.

    Raises:
        ConfigError: if no leaf is quantized; with the reasons.
        CaptureError: if a leaf cannot be captured.
    """
    if not inplace:
        model = copy.deepcopy(model)
    captures, new, floats = _Captures(), {}, []
    matched: set[str] = set()
    for path, module in _leaves(model):
        example, kind, rank, dims = _example(module)
        if not module.weight.is_floating_point():  # type: ignore[union-attr,operator]
            continue
        gm = captures.get(module, path, example, dims)
        set_recipe(gm, recipe)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gm = Pipeline.parse(recipe.prepare).run(gm).graph
        unused = {str(w.message) for w in caught if issubclass(w.category, UnusedRuleWarning)}
        matched |= {_message(r) for r in recipe.rules} - unused
        quantized, not_quantized = read_graph(gm)
        floats += not_quantized
        if quantized:
            gm.meta["inc"]["bytes_before"] = attribute_bytes(module)
            facts = {n: getattr(module, n) for n in ("in_features", "out_features", "nf", "num_embeddings", "embedding_dim")
                     if hasattr(module, n)}  # fmt: skip
            new[path] = Leaf(gm, kind, rank, path, module, facts)
    for rule in recipe.rules:
        if rule.where.kind != "all" and _message(rule) not in matched:
            warnings.warn(_message(rule), UnusedRuleWarning, stacklevel=3)
    if not new:
        reasons = "; ".join(dict.fromkeys(f"{f.op}: {f.detail}" for f in floats)) or "it has no Linear, Conv or Embedding"
        hint = "give example_inputs, so that functional operators are seen, or change the config"
        raise ConfigError(f"nothing in this model can be quantized ({reasons})", hint=hint)
    before = attribute_bytes(model)
    for path, leaf in new.items():
        _put(model, path, leaf)
    model.__dict__["_inc_module_scope"] = {"floats": floats, "bytes_before": before, "recipe": recipe}
    return model


def _message(rule: Any) -> str:
    return f"{rule.origin or rule.where} matched no operator of the model"


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, name, module)


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` has replaced leaves of this model."""
    return "_inc_module_scope" in model.__dict__


def convert(model: nn.Module, backend: str | None, inplace: bool) -> nn.Module:
    """Convert and lower each leaf. A leaf that no calibration data reached stays float, and the report says so.

    Raises:
        CalibrationError: if no leaf saw data.
    """
    leaves = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, Leaf)]
    if leaves and all(isinstance(m.inner, QuantizedModel) for _, m in leaves):
        raise ConfigError("the model is converted already", hint="convert takes the result of prepare")
    seen = {p: _has_data(m.inner) for p, m in leaves}
    if not any(seen.values()):
        hint = "call it on representative inputs first: for x in data: prepared(x)"
        raise CalibrationError("the prepared model has seen no calibration data", hint=hint)
    facts = model.__dict__["_inc_module_scope"]
    report = Report(facts["recipe"].method, "", floats=list(facts["floats"]), bytes_before=facts["bytes_before"])
    report.notes.append("quantized layer by layer: operators outside Linear, Conv and Embedding modules were not looked at")
    done: dict[str, nn.Module] = {}
    for path, leaf in leaves:
        if not seen[path]:
            floats, _ = read_graph(leaf.inner)
            report.floats += [OpLine(x.name, path, x.op, "no calibration data reached it") for x in floats]
            done[path] = leaf._original[0]  # type: ignore[assignment]
            continue
        part = finish(leaf.inner, backend)
        report.backend = part.report.backend
        report.kernels += part.report.kernels
        report.reference += part.report.reference
        done[path] = Leaf(part, leaf.kind, leaf.rank, path, None, leaf.facts)
    missing = [p for p in seen if not seen[p]]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.warn(f"{len(missing)} layers saw no calibration data and stay float: {shown}", IncWarning, stacklevel=3)
    if not inplace:
        model = copy.deepcopy(model)
    for path, module in done.items():
        _put(model, path, module)
    report.bytes_after = attribute_bytes(model)
    name = "report" if not hasattr(model, "report") else "quantization_report"
    model.__dict__[name] = report
    return model


def _has_data(gm: nn.Module) -> bool:
    observers = [m for m in gm.modules() if isinstance(m, Observer)]
    return all(o.elements for o in observers)
