"""`export`: from a model to the graph that `prepare` takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from inc_graph.capture import capture
from inc_graph.errors import CaptureError

__all__ = ["export", "export_model_for_pt2e_quant"]


def export(
    model: nn.Module, example_inputs: Any, dynamic_shapes: Any = None, *, kwargs: dict[str, Any] | None = None
) -> fx.GraphModule:
    """Capture `model` as one graph in normal form.

    Args:
        model: In eval mode. It is not changed; the graph shares its parameters.
        example_inputs: Tuple of positional inputs, one tensor, or a dict of keyword inputs.
        dynamic_shapes: As for `torch.export.export`: which input dimensions may vary.
        kwargs: Keyword inputs beside positional ones.

    Raises:
        CaptureError: if the model is not a module, is in training mode, lies on the meta device, or cannot be exported; it
            carries the exporter's reason, the module path and what to do.
    """
    check_model(model)
    if isinstance(example_inputs, dict):
        kwargs, example_inputs = {**example_inputs, **(kwargs or {})}, ()
    elif isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    elif not isinstance(example_inputs, tuple | list):
        raise CaptureError(f"example_inputs must be a tuple, a tensor or a dict, not {type(example_inputs).__name__}")
    return capture(model, tuple(example_inputs), kwargs, dynamic_shapes)


export_model_for_pt2e_quant = export


def check_model(model: Any) -> None:
    """Refuse what cannot be quantized at all. CaptureError."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if model.training and not isinstance(model, fx.GraphModule):
        raise CaptureError("the model is in training mode", hint="call model.eval() first")
    meta = next((n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta), None)
    if meta is not None:
        raise CaptureError(f"tensor {meta!r} is on the meta device and has no values", hint="load the weights first")
