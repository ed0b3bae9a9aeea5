"""`export`: from a model to the graph that `prepare` takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from inc_graph.capture import capture
from inc_graph.errors import CaptureError
from inc_graph.export.checks import check_model, refuse_quantized

__all__ = ["check_model", "example_call", "export", "export_model_for_pt2e_quant", "refuse_quantized", "unwrap"]


def export(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    *,
    kwargs: dict[str, Any] | None = None,
) -> fx.GraphModule:
    """Capture `model` as one graph in normal form.

    Args:
        model: In eval mode. It is not changed; the graph shares its parameters. An `ExportedProgram` needs no more
            arguments: its own example inputs and dynamic dimensions are taken. A `torch.compile`d or data-parallel
            model stands for the module that it wraps.
        example_inputs: Tuple of positional inputs, one tensor, or a dict of keyword inputs.
        dynamic_shapes: As for `torch.export.export`: which input dimensions may vary.
        kwargs: Keyword inputs beside positional ones.

    Raises:
        CaptureError: if the model is not a module, is in training mode (or a program of a model that was), lies on the
            meta device, does not take the example inputs, or cannot be exported; it carries the exporter's reason, the
            module path and what to do.
        ConfigError: if the model, or a part of it, is prepared or converted.
    """
    if isinstance(model, ExportedProgram):
        if example_inputs is None and dynamic_shapes is None and kwargs is None:
            return _recapture(model)
        model = model.module()
    module: nn.Module = unwrap(model)
    check_model(module)
    refuse_quantized(module)
    args, keywords = example_call(module, example_inputs, kwargs)
    return capture(module, args, keywords, dynamic_shapes)


export_model_for_pt2e_quant = export


def unwrap(model: Any) -> Any:
    """The module behind `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def example_call(
    model: nn.Module, example_inputs: Any, kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) inputs that call the model. CaptureError if it does not take them."""
    args: tuple[Any, ...] = ()
    if isinstance(example_inputs, Mapping):  # also what a tokenizer of transformers gives
        args, kwargs = (), {**example_inputs, **(kwargs or {})}
    elif isinstance(example_inputs, torch.Tensor):
        args, kwargs = (example_inputs,), dict(kwargs or {})
    elif isinstance(example_inputs, tuple | list):
        args, kwargs = tuple(example_inputs), dict(kwargs or {})
    elif example_inputs is None and kwargs:
        args, kwargs = (), dict(kwargs)
    else:
        raise CaptureError(f"example_inputs must be a tuple, a tensor or a dict, not {type(example_inputs).__name__}")
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # no signature to compare with
        return args, kwargs
    name = type(model).__name__
    try:
        signature.bind(*args, **kwargs)
    except TypeError as e:
        hint = f"example_inputs must be what model(...) takes: {name}.forward{_names(signature)}"
        raise CaptureError(f"{name} does not take the example inputs: {e}", hint=hint) from None
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.is_meta:
            raise CaptureError("an example input is on the meta device", hint="give inputs with values")
    return args, kwargs


def _names(signature: inspect.Signature) -> str:
    return f"({', '.join(p.name if p.default is p.empty else f'{p.name}=...' for p in signature.parameters.values())})"


def _recapture(program: ExportedProgram) -> fx.GraphModule:
    """Capture a program again, with its own example inputs and dynamic dimensions."""
    if program.example_inputs is None:
        raise CaptureError("the exported program holds no example inputs", hint="export(program, example_inputs)")
    args, kwargs = program.example_inputs
    values = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    auto = torch.export.Dim.AUTO
    shapes = [
        {i: auto for i, d in enumerate(v.shape) if not isinstance(d, int)} if isinstance(v, torch.Tensor) else None
        for v in (values.get(name) for name in program.graph_signature.user_inputs)
    ]
    module = program.module()
    check_model(module)
    refuse_quantized(module)
    dynamic = None
    if any(shapes):
        by_position, by_name = pytree.tree_unflatten(shapes, program.call_spec.in_spec)
        names = list(inspect.signature(module.forward).parameters)
        dynamic = {**dict(zip(names, by_position, strict=False)), **by_name}
    return capture(module, tuple(args), dict(kwargs), dynamic)
