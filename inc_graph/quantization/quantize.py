"""The entry functions under the name of the module that neural_compressor has them in."""

from __future__ import annotations

from typing import Any

from torch import nn

from inc_graph.quantization import qat
from inc_graph.quantization.api import convert, finalize_calibration, prepare, quantize
from inc_graph.quantization.qat import freeze_batch_norm, freeze_observers
from inc_graph.quantization.tuning import autotune

__all__ = [
    "autotune",
    "convert",
    "finalize_calibration",
    "freeze_batch_norm",
    "freeze_observers",
    "prepare",
    "prepare_qat",
    "quantize",
]


def prepare_qat(
    model: nn.Module,
    mapping: Any = None,
    inplace: bool = True,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    learn_scales: bool = False,
    freeze_after: int | None = None,
    check_finite: bool = True,
    backend: str = "auto",
) -> nn.Module:
    """Make a model ready for quantization-aware training.

    Layers that are trained for a format stay what they are, under their names, with their parameters: an optimizer that
    was made before goes on working, and a checkpoint of the float model can be loaded into the prepared one.

    Args:
        model: In train mode.
        mapping: {layers: format}, with keys as `set_local` has them (a module class, a name or regular expression, a
            predicate) and formats by name ("MXFP8", "MXFP4", "INT8", "INT4", ...), as configs, or None for float; or a
            config. None: {torch.nn.Linear: "MXFP8"}.
        inplace: True prepares the model itself, False a copy. With example inputs a graph is returned, whose parameters
            are those of the model, or of a copy.
        example_inputs: Tuple, tensor or dict; with them the model is exported, and functions and sums between layers
            are trained for as well; batch norms are folded. Without them it is trained layer by layer.
        dynamic_shapes: As for `torch.export.export`; only with `example_inputs`.
        learn_scales: Train scales as parameters (LSQ) where the format allows it: make the optimizer afterwards.
        freeze_after: Batches after which ranges of activations stay as they are; None: `freeze_observers` says when.
        check_finite: Refuse NaN and infinity in a layer, and in the gradients that come back to it, with its name.
        backend: The backend that `convert` is to lower to.

    Returns:
        The prepared model. Train it, then give it to `convert`.

    Raises:
        ConfigError: the model is in eval mode, prepared or converted; the mapping names no known format or no layer; a
            layer cannot be trained. Nothing has been changed then.
        CaptureError: it is no model, or cannot be exported with these inputs.
    """
    return qat.prepare(
        model,
        mapping,
        inplace,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        learn_scales=learn_scales,
        freeze_after=freeze_after,
        check_finite=check_finite,
        backend=backend,
    )
