"""Quantized layers in a model that keeps its class: finding them, putting them in, saving them."""

from __future__ import annotations

import copy
import enum
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from inc_graph.errors import CaptureError, IncWarning, SavedModelError
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.model import QuantizedModel, all_or_nothing
from inc_graph.quantization.saved import destination, save_layers
from inc_graph.report import Report
from inc_graph.saving.values import encode

__all__ = ["call_every_layer", "keep_report", "leaves", "own_copy", "put", "report_of", "save", "tensors_of"]


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of a model. CaptureError if it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as e:
        hint = "use inplace=True, or make the copy yourself"
        raise CaptureError(f"the model cannot be copied: {type(e).__name__}: {e}", hint=hint) from e


def leaves(model: nn.Module) -> dict[Leaf, list[str]]:
    """The leaves and the paths where each one stands."""
    found: dict[Leaf, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Leaf):
            found.setdefault(module, []).append(path)
    return found


def put(model: nn.Module, paths: list[str], module: nn.Module | None) -> nn.Module:
    """Put a module at its paths; the model, which is the module itself if its path is ''."""
    if module is None:
        return model
    for path in paths:
        parent, _, name = path.rpartition(".")
        if not name:
            return module
        model.get_submodule(parent)._modules[name] = module
    return model


def call_every_layer(model: nn.Module, of: type[nn.Module] = Leaf) -> list[tuple[nn.Module, str, Any]]:
    """Turn off torch's fused transformer encoder, which reads the layers' weights and never calls the layers; where it
    holds modules of the class `of`."""
    changed = []
    for module in model.modules():
        off = {
            nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
            nn.TransformerEncoder: ("use_nested_tensor", False),
        }
        for kind, (name, value) in off.items():
            if isinstance(module, kind) and any(isinstance(m, of) for m in module.modules()) and name in vars(module):
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    return changed


def keep_report(model: nn.Module, report: Report) -> None:
    """Give a model with quantized layers its report and `save`; a `save` that it has is kept as `orig_save`."""
    all_or_nothing(model)
    model.__dict__["report" if not hasattr(model, "report") else "quantization_report"] = report
    if "save" in model._modules or "save" in model._parameters or "save" in model._buffers:
        return  # a part of the model has the name: `inc_graph.quantization.save(model)` saves it
    own = getattr(model, "save", None)
    if own is not None and getattr(own, "__func__", None) is not save:
        model.__dict__["orig_save"] = own
    model.__dict__["save"] = types.MethodType(save, model)


def report_of(model: nn.Module) -> Report | None:
    """The report that `keep_report` has put there."""
    found = (model.__dict__.get(name) for name in ("quantization_report", "report"))
    return next((r for r in found if isinstance(r, Report)), None)


# --------------------------------------------------------------------------------------------------------------- save
def save(self: nn.Module, checkpoint_dir: Any = "saved_results", format: Any = "default", **options: Any) -> None:
    """Write the model to a folder; `inc_graph.quantization.load(folder, original_model)` puts it into the float model.

    Args:
        checkpoint_dir: The folder. What was saved there before is replaced in one step.
        format: "default".
        options: `max_shard_size`: bytes of a file of tensors, as a number or such as "2GB".

    Raises:
        SavedModelError: the folder cannot be written, or something in the model has no form in a file.
    """
    folder, limit = destination(checkpoint_dir, format, options)
    found = leaves(self)
    report = report_of(self)
    algorithms = self.__dict__.get("_inc_algorithm", {}).get("algorithms")
    if report is None or not all(isinstance(leaf.inner, QuantizedModel) for leaf in found):
        raise SavedModelError("only a converted model can be saved", hint="convert(prepared) makes one")
    layers = [(paths, leaf.inner, _facts(leaf)) for leaf, paths in found.items()]
    kind = f"{type(self).__module__}.{type(self).__qualname__}"
    save_layers(layers, _state(self), report, kind, folder, limit, algorithms)  # type: ignore[arg-type]


def _facts(leaf: Leaf) -> dict[str, Any]:
    """What a leaf knows beside its graph."""
    kept, lost = {}, []
    for name, value in leaf._facts.items():
        try:
            encode(value)
        except SavedModelError:
            lost.append(name)
        else:
            kept[name] = value.value if isinstance(value, enum.Enum) else value
    if lost:
        text = f"layer {leaf.path!r}: {', '.join(lost)} cannot be saved, and will be missing in what is loaded"
        warnings.warn(text, IncWarning, stacklevel=5)
    form = leaf.form
    return {"form": [form.kind, form.rank, form.size, form.dtype], "attributes": kept}


def tensors_of(model: nn.Module, layers: Iterable[str]) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(path, owner, name, tensor) of each parameter and buffer that is not in a layer at one of the paths `layers`;
    shared ones at each path."""
    inside = tuple(f"{path}." if path else "" for path in layers)
    for path, module in model.named_modules(remove_duplicate=False):
        if f"{path}.".startswith(inside):
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{name}" if path else name, module, name, tensor


def _state(model: nn.Module) -> list[tuple[list[str], torch.Tensor, dict[str, Any]]]:
    """(paths, tensor, facts) of each tensor outside of the quantized layers."""
    found: dict[int, tuple[list[str], torch.Tensor, dict[str, Any]]] = {}
    layers = [path for paths in leaves(model).values() for path in paths]
    for path, owner, name, tensor in tensors_of(model, layers):
        if id(tensor) not in found:
            facts = {"parameter": name in owner._parameters, "grad": tensor.requires_grad}
            found[id(tensor)] = ([], tensor, facts)
        found[id(tensor)][0].append(path)
    return list(found.values())
