"""`prepare`, `convert`, `quantize`, `finalize_calibration`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from inc_graph.calibrate import Observer
from inc_graph.errors import CaptureError, ConfigError, IncWarning
from inc_graph.export import check_model, export
from inc_graph.graph import adopt, clone, get_level
from inc_graph.passmanager import Pipeline
from inc_graph.quantization import leaf
from inc_graph.quantization.config import BaseConfig
from inc_graph.quantization.finish import finish
from inc_graph.quantization.model import QuantizedModel
from inc_graph.recipe import get_recipe, set_recipe
from inc_graph.registry import BACKENDS
from inc_graph.report import attribute_bytes, read_graph
from inc_graph.utils.device import choose_backend

__all__ = ["convert", "finalize_calibration", "prepare", "quantize"]


def prepare(
    model: nn.Module,
    quant_config: BaseConfig,
    inplace: bool = True,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    backend: str = "auto",
) -> nn.Module:
    """Make a model ready for calibration.

    Args:
        model: A graph from `export`, or any module in eval mode.
        quant_config: What to quantize; it is not changed.
        inplace: For a graph from `export`: True turns that graph into the prepared one, False leaves it bit-identical. An
            eager module that is exported here is never changed; one that is prepared layer by layer is, with True.
        example_inputs: Tuple, tensor or dict; with them an eager module is exported, without them its layers are prepared
            one by one and it keeps its class.
        dynamic_shapes: As for `torch.export.export`.
        backend: The backend that the operators are chosen for.

    Returns:
        The prepared model: run calibration data through it, then call `convert`.

    Raises:
        ConfigError, CaptureError, PassError: nothing has been changed then.
    """
    check_model(model)
    if not isinstance(quant_config, BaseConfig):
        raise ConfigError(f"quant_config must be a config, not {quant_config!r}", hint="for example StaticQuantConfig()")
    _refuse_twice(model)
    name, note = choose_backend(backend)
    if note:
        warnings.warn(note, IncWarning, stacklevel=2)
    recipe = quant_config.recipe(name, BACKENDS.get(name).supported())
    if not _is_ours(model):
        if example_inputs is None:
            return leaf.prepare(model, recipe, inplace)
        try:
            model, inplace = export(model, example_inputs, dynamic_shapes), True
        except CaptureError as e:
            warnings.warn(f"the whole model cannot be exported, so it is quantized layer by layer: {e}", IncWarning, stacklevel=2)
            return leaf.prepare(model, recipe, inplace)
    assert isinstance(model, fx.GraphModule)
    if get_level(model) != "float":
        raise ConfigError(f"prepare needs a float model, this graph is at level {get_level(model)!r}")
    work = clone(model)
    set_recipe(work, recipe)
    result = Pipeline.parse(recipe.prepare).run(work)
    _refuse_nothing(result.graph)
    result.graph.meta["inc"]["bytes_before"] = attribute_bytes(model)
    result.graph.meta["inc"]["timings"] = [list(t) for t in result.timings]
    return adopt(model, result.graph) if inplace else result.graph


def _is_ours(model: nn.Module) -> bool:
    return isinstance(model, fx.GraphModule) and "inc" in model.meta


def _refuse_twice(model: nn.Module) -> None:
    if isinstance(model, QuantizedModel) or any(isinstance(m, QuantizedModel) for m in model.modules()):
        raise ConfigError("the model is converted already", hint="prepare the float model")
    if any(isinstance(m, Observer) for m in model.modules()):
        raise ConfigError("the model is prepared already", hint="run calibration data through it, then call convert")


def _refuse_nothing(gm: fx.GraphModule) -> None:
    """Silence is a defect: a model in which nothing is quantized is an error that says why."""
    quantized, floats = read_graph(gm)
    if quantized:
        return
    reasons = list(dict.fromkeys(f"{f.op}: {f.detail}" for f in floats))
    shown = "; ".join(reasons[:5]) or "it has no operator with float inputs and weights"
    raise ConfigError(f"nothing in this model can be quantized ({shown})", hint="see the reasons, or change the config")


def convert(
    model: nn.Module,
    quant_config: BaseConfig | None = None,
    inplace: bool = True,
    *,
    backend: str | None = None,
    reference: bool = False,
) -> nn.Module:
    """Turn a prepared, calibrated model into a quantized one.

    Args:
        model: From `prepare`, after calibration data has run through it. It stays usable.
        quant_config: Only for a model that was not prepared, and a method that needs no calibration.
        inplace: For a model prepared layer by layer: replace the layers in it. A graph is always converted into a new model.
        backend: Lower to this backend instead of the one it was prepared for.
        reference: Run the Q-DQ meaning itself, on no backend (same as backend="eager").

    Returns:
        A `QuantizedModel` (graph), or the model with quantized layers (layer by layer).

    Raises:
        CalibrationError: no data has run through the model, or through a part of it.
        ConfigError: it is not prepared, or converted already.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a prepared model, got {type(model).__name__}")
    if isinstance(model, QuantizedModel):
        raise ConfigError("the model is converted already", hint="convert takes the result of prepare")
    if reference:
        backend = "eager"
    if _is_ours(model) and get_level(model) == "observed":  # type: ignore[arg-type]
        return finish(model, backend)  # type: ignore[arg-type]
    if leaf.is_prepared(model):
        return leaf.convert(model, backend, inplace)
    if any(isinstance(m, QuantizedModel) for m in model.modules()):
        raise ConfigError("the model is converted already", hint="convert takes the result of prepare")
    if quant_config is None:
        raise ConfigError("the model is not prepared", hint="prepared = prepare(model, config), run data, then convert(prepared)")
    raise ConfigError(
        f"{type(quant_config).__name__} needs calibration data, so the model must be prepared first",
        hint="use prepare, run data, convert; or quantize(model, config, run_fn=...)",
    )


def quantize(
    model: nn.Module,
    quant_config: BaseConfig,
    run_fn: Callable[..., Any] | None = None,
    run_args: Any = None,
    inplace: bool = True,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    backend: str = "auto",
) -> nn.Module:
    """`prepare`, `run_fn(prepared, *run_args)`, `convert` in one call. Arguments and errors as theirs.

    Raises:
        ConfigError: if `run_fn` is missing though the method needs calibration data.
    """
    if run_fn is None:
        raise ConfigError("this method needs calibration data", hint="pass run_fn, a function that runs data through the model")
    prepared = prepare(model, quant_config, inplace, example_inputs, dynamic_shapes=dynamic_shapes, backend=backend)
    args = () if run_args is None else run_args if isinstance(run_args, tuple | list) else (run_args,)
    run_fn(prepared, *args)
    return convert(prepared, inplace=inplace)


def finalize_calibration(model: nn.Module) -> None:
    """End calibration: observers stop collecting, and ranges stay as they are.

    Raises:
        ConfigError: if the model is not prepared.
        CalibrationError: if an observed value saw no data; names it.
    """
    observers = [m for m in model.modules() if isinstance(m, Observer)]
    if not observers:
        raise ConfigError("the model is not prepared, so there is no calibration to end")
    for observer in observers:
        observer.calculate_qparams()
    for observer in observers:
        observer.enabled = False
