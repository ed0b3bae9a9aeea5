"""`save` and `load`."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn

from inc_graph.errors import CaptureError, ConfigError, IncError, IncWarning, SavedModelError, UnknownNameError
from inc_graph.export import refuse_quantized, unwrap
from inc_graph.quantization.compute_dtype import ComputeDtypes
from inc_graph.quantization.finish import assemble
from inc_graph.quantization.layers import call_every_layer, keep_report, own_copy, put, report_of, tensors_of
from inc_graph.quantization.layers import save as save_model
from inc_graph.quantization.leaf import Form, Leaf, is_layer, is_recurrent
from inc_graph.quantization.model import QuantizedModel
from inc_graph.quantization.ordinary import ordinary_tensors
from inc_graph.quantization.saved import check_format
from inc_graph.quantization.user_algorithms import rebuild
from inc_graph.recipe import Recipe
from inc_graph.registry import BACKENDS
from inc_graph.report import Report, attribute_bytes
from inc_graph.saving import SavedModel, read_graph, read_model
from inc_graph.saving.folder import reading
from inc_graph.saving.values import decode
from inc_graph.utils.device import choose_backend
from inc_graph.utils.progress import progress

__all__ = ["load", "save"]

QuantizedModel.assemble = staticmethod(assemble)


def save(model: nn.Module, checkpoint_dir: Any = "saved_results", format: Any = "default", **options: Any) -> None:
    """Write a converted model to a folder; the same as `model.save`.

    Args:
        model: What `convert` or `quantize` has made.
        checkpoint_dir: The folder. What was saved there before is replaced in one step.
        format: "default".
        options: `max_shard_size`: bytes of a file of tensors, as a number or such as "2GB".

    Raises:
        SavedModelError: the folder cannot be written, or the model has something that has no form in a file.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a converted model, got {type(model).__name__}")
    model = unwrap(model)
    if not isinstance(model, QuantizedModel) and report_of(model) is None:
        inside = [path for path, m in model.named_modules() if isinstance(m, QuantizedModel)]
        hint = f"save its part {inside[0]!r} instead" if inside else "prepare, calibrate and convert it first"
        raise SavedModelError("only a converted model can be saved", hint=hint)
    if isinstance(model, QuantizedModel):
        model.save(checkpoint_dir, format, **options)
    else:
        save_model(model, checkpoint_dir, format, **options)


def load(
    model_name_or_path: str | os.PathLike[str] | None = None,
    original_model: Any = None,
    format: Any = "default",
    device: Any = "cpu",
    **kwargs: Any,
) -> nn.Module:
    """Read a model that `save` has written.

    Args:
        model_name_or_path: The folder.
        original_model: For a model that was quantized layer by layer: the float model, or its class if that needs no
            arguments. It may be on the meta device (`load_empty_model`). It becomes the quantized model, once all of
            the saved one has been read. A model that was exported needs none.
        format: "default".
        device: Where the model goes.
        kwargs: `backend`: to run on, instead of the one it was saved with (or that of the device). `compute_dtype`: as
            for `convert`. `output_dir` and `model`: other names of the first two arguments.

    Returns:
        As `convert` gave it. The tensors are mapped from the files as far as the backend does not pack them.

    Raises:
        SavedModelError: the folder is not that of a saved model, damaged, or newer; or it does not fit to
            `original_model`. Names the file and the field. Nothing has been changed then.
    """
    path = kwargs.pop("output_dir", kwargs.pop("checkpoint_dir", model_name_or_path))
    original_model = kwargs.pop("model", original_model)
    backend = kwargs.pop("backend", None)
    choice = ComputeDtypes.of(kwargs.pop("compute_dtype", None))
    if kwargs:
        hint = "it has backend, compute_dtype, output_dir and model"
        raise ConfigError(f"load has no argument {next(iter(kwargs))!r}", hint=hint)
    check_format(format)
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ConfigError(f"load needs the folder of a saved model, not {path!r}")
    place = _device(device)
    try:
        with ordinary_tensors(original_model), reading(path):
            made = _load(path, original_model, place, backend, choice)
    except OSError as e:
        raise SavedModelError(f"{path} cannot be read: {e.strerror or e}") from e
    choice.tell(made)
    return made


def _load(path: Any, original_model: Any, place: torch.device, backend: str | None, choice: ComputeDtypes) -> nn.Module:
    saved = read_model(path, place)
    try:
        report = Report.from_json(saved.facts.get("report"))
        if saved.scope == "graph":
            return _load_graph(saved, report, _backend(saved, backend, place), place, choice)
        return _load_layers(saved, report, original_model, backend, place, choice)
    except SavedModelError as e:
        raise SavedModelError(f"{path}: {e.message}", node=e.node, module=e.module, hint=e.hint) from e
    except NotImplementedError as e:
        raise SavedModelError(f"{path}: {e}", hint="import the module that enters it") from e
    except (ConfigError, UnknownNameError) as e:
        raise SavedModelError(f"{path}: {e.message}", hint=e.hint) from e


def _device(device: Any) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, TypeError, AssertionError, ModuleNotFoundError) as e:
        reason = str(e).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here: {reason}", hint="load on 'cpu'") from e
    return place


def _backend(saved: SavedModel, asked: str | None, device: torch.device) -> str:
    """The backend that was asked for; that of the saved model if it can run here; or that of the device."""
    if asked is not None:
        return choose_backend(asked, device.type)[0]
    old = str(saved.facts.get("backend"))
    same = str(saved.facts.get("device")).partition(":")[0] == device.type
    if same and old in BACKENDS and BACKENDS.get(old).available() is None:
        return old
    name, note = choose_backend("auto", device.type)
    if same or note:
        text = note or f"saved for backend {old!r}, which cannot run here; using {name!r}"
        warnings.warn(text, IncWarning, stacklevel=4)
    return name


# -------------------------------------------------------------------------------------------------------------- graph
def _load_graph(
    saved: SavedModel, report: Report, backend: str, device: torch.device, choice: ComputeDtypes
) -> QuantizedModel:
    body = _table(saved.body, "graph")
    moved = device if str(saved.facts.get("device")) != str(device) else None
    gm = read_graph(body["graph"], saved.tensors, moved)
    choice.put(gm)
    made = _assembled(gm, backend, report)
    made.report.notes, made.report.weights = report.notes, report.weights
    return made


def _assembled(gm: Any, backend: str, report: Report) -> QuantizedModel:
    try:
        timings = [t for t in report.timings if t[0] != "lower"]  # that is done anew
        return assemble(gm, backend, report.method, timings, report.bytes_before)
    except IncError:
        raise
    except Exception as e:  # what the kernels say of a graph that passes for one and makes no sense
        raise SavedModelError(f"backend {backend!r} cannot take the graph: {type(e).__name__}: {str(e)[:200]}") from e


def _table(data: Any, *names: str) -> dict[str, Any]:
    if not isinstance(data, dict) or not set(names) <= set(data):
        raise SavedModelError(f"the fields {', '.join(names)} are not all there")
    return data


# ------------------------------------------------------------------------------------------------------------- layers
def _load_layers(
    saved: SavedModel, report: Report, original: Any, asked: str | None, device: torch.device, choice: ComputeDtypes
) -> nn.Module:
    body = _table(saved.body, "class", "layers", "state")
    model = _original(original, str(body["class"])[:200])
    if not all(isinstance(body[k], list) for k in ("layers", "state")):
        raise SavedModelError("the fields layers and state are not lists")
    if saved.scope == "algorithm":
        model = _rebuilt(model, saved.facts.get("algorithms"))
    recipe: Any = saved.facts.get("recipe")
    backend = report.backend
    if body["layers"]:
        Recipe.from_json(recipe)
        backend = _backend(saved, asked, device)
    elif saved.scope == "module" and asked is not None:
        backend, _ = choose_backend(asked, device.type)
    plan = []
    parts = Report(report.method, backend, floats=report.floats, notes=report.notes, timings=report.timings)
    parts.bytes_before, parts.weights = report.bytes_before, report.weights
    moved = device if str(saved.facts.get("device")) != str(device) else None
    with progress("load", len(body["layers"])) as step:
        taken: set[str] = set()
        for data in body["layers"]:
            paths = _paths(data)
            step(paths[0])
            if not taken.isdisjoint(paths) or len(set(paths)) != len(paths):
                raise SavedModelError(f"layer {paths[0][:80]!r} is there twice")
            taken.update(paths)
            old = _layer(model, paths)
            gm = read_graph(_table(data, "graph", "facts")["graph"], saved.tensors, moved)
            gm.meta["inc"]["recipe"] = recipe
            choice.put(gm, tuple(paths))
            inner = _assembled(gm, backend, Report(report.method))
            plan.append((paths, _leaf(inner, data["facts"], paths[0], old)))
            parts.kernels += inner.report.kernels
            lines = inner.report.recipe
            parts.recipe = lines if parts.recipe is None else parts.recipe + lines
            parts.reference += inner.report.reference
            parts.smoothing += inner.report.smoothing
    inside = [p for paths, _ in plan for p in paths]
    state = _state(model, body["state"], saved, inside, body.get("state_dict") is True)
    for paths, leaf in plan:
        model = put(model, paths, leaf)
    for owner, name, tensor in state:
        (owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers)[name] = tensor  # type: ignore
    call_every_layer(model)
    model.eval()
    parts.bytes_after = attribute_bytes(model)
    keep_report(model, parts)
    return model


def _rebuilt(model: nn.Module, algorithms: Any) -> nn.Module:
    """A copy of the float model, in the form that own methods give it; its values are those of the float model."""
    try:
        return rebuild(own_copy(model), algorithms)
    except IncError:
        raise
    except Exception as e:  # whatever an entry says
        raise SavedModelError(f"the own methods cannot rebuild the model: {type(e).__name__}: {e}") from e


def _original(original: Any, saved_class: str) -> nn.Module:
    if original is None:
        hint = f"load(folder, original_model=model) with the float model, a {saved_class}"
        raise SavedModelError("it was quantized layer by layer and needs the model that the layers stand in", hint=hint)
    if isinstance(original, type) and issubclass(original, nn.Module):
        try:
            original = original()
        except TypeError as e:
            raise SavedModelError(
                f"{original.__name__} needs arguments: {e}", hint="give a model, not its class"
            ) from e
    if not isinstance(original, nn.Module):
        raise ConfigError(f"original_model must be a torch.nn.Module, not {type(original).__name__}")
    if any(isinstance(m, Leaf | QuantizedModel) for m in original.modules()):
        raise ConfigError("original_model is quantized already", hint="give the float model")
    refuse_quantized(original)
    return original


def _paths(data: Any) -> list[str]:
    paths = data.get("paths") if isinstance(data, dict) else None
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise SavedModelError("field 'paths' of an entry is not a list of names")
    return paths


def _layer(model: nn.Module, paths: list[str]) -> nn.Module:
    found = []
    for path in paths:
        try:
            found.append(model.get_submodule(path))
        except AttributeError as e:
            raise SavedModelError(
                f"original_model has no layer {path[:80]!r}", hint="give the model that was quantized"
            ) from e
        if not (is_layer(found[-1]) or is_recurrent(found[-1])):
            kind = type(found[-1]).__name__
            raise SavedModelError(f"{path!r} of original_model is a {kind}, not a layer that is quantized")
        if found[-1] is not found[0]:
            raise SavedModelError(f"{paths[0]!r} and {path!r} of original_model are two layers, saved was one")
    return found[0]


def _leaf(inner: QuantizedModel, facts: Any, path: str, old: nn.Module) -> Leaf:
    facts = decode(facts)
    try:
        kind, rank, size, dtype = facts["form"]
        attributes = dict(facts["attributes"])
    except (KeyError, TypeError, ValueError) as e:
        raise SavedModelError("its facts cannot be read", module=path) from e
    good = kind in ("rows", "index", "space", "steps") and isinstance(rank, int) and isinstance(size, int)
    if not good or not isinstance(dtype, torch.dtype) or not all(isinstance(k, str) for k in attributes):
        raise SavedModelError("its facts cannot be read", module=path)
    for name, value in attributes.items():
        old_value = getattr(old, name, value)
        simple = isinstance(value, bool | int | str | tuple) and type(old_value) is type(value)
        if simple and name != "training" and old_value != value:
            raise SavedModelError(f"{name} of original_model is {old_value}, saved was {value}", module=path)
    return Leaf.loaded(inner, Form(kind, rank, size, dtype), path, old, attributes)


def _state(
    model: nn.Module, entries: list[Any], saved: SavedModel, layers: list[str], imported: bool
) -> list[tuple[nn.Module, str, torch.Tensor]]:
    wanted = {path: (owner, name, old) for path, owner, name, old in tensors_of(model, layers)}
    if imported:  # a state_dict has no buffers that are not persistent, and does not say what is a parameter
        wanted = {p: w for p, w in wanted.items() if w[1] not in w[0]._non_persistent_buffers_set}
    plan = []
    for entry in entries:
        paths = _paths(entry)
        tensor = saved.tensors.get(paths[0], entry)
        if imported and paths[0] in wanted:
            entry = {**entry, "parameter": isinstance(wanted[paths[0]][2], nn.Parameter)}
        if entry.get("parameter"):
            grad = bool(entry.get("grad")) and (tensor.is_floating_point() or tensor.is_complex())
            tensor = nn.Parameter(tensor, requires_grad=grad)
        for path in paths:
            if path not in wanted:
                hint = "give the model that was quantized, with the same settings"
                raise SavedModelError(f"original_model has no tensor {path[:80]!r}", hint=hint)
            owner, name, old = wanted.pop(path)
            if old.shape != tensor.shape:
                what = f"{path} of original_model has shape {list(old.shape)}, saved was {list(tensor.shape)}"
                raise SavedModelError(what, hint="give the model that was quantized, with the same settings")
            if isinstance(old, nn.Parameter) != isinstance(tensor, nn.Parameter):
                raise SavedModelError(f"{path} is a parameter in one of the two and a buffer in the other")
            plan.append((owner, name, tensor))
    if wanted:
        shown = ", ".join(list(wanted)[:5])
        raise SavedModelError(
            f"original_model has {shown}, which were not saved", hint="give the model that was quantized"
        )
    return plan
