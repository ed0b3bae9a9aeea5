"""`prepare`, `convert`, `quantize`, `finalize_calibration`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import fx, nn
from torch.export import ExportedProgram

from inc_graph.batches import one_batch_a_call
from inc_graph.calibrate import Observer
from inc_graph.capture import capture, own_mutated
from inc_graph.channel_stats import ChannelObserver
from inc_graph.common.mode import Mode
from inc_graph.errors import CaptureError, ConfigError, IncWarning
from inc_graph.export import check_model, example_call, export, refuse_quantized, unwrap
from inc_graph.gram import GramObserver
from inc_graph.graph import adopt, clone, get_level, is_float, module_path
from inc_graph.input_mean import MeanObserver
from inc_graph.oppattern import pattern_of
from inc_graph.passmanager import Pipeline
from inc_graph.quantization import module_scope, qat
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.block_inputs import block_inputs_of
from inc_graph.quantization.composable import as_config
from inc_graph.quantization.compute_dtype import ComputeDtype, ComputeDtypes, chosen
from inc_graph.quantization.finish import finish, no_data, observers_of, remember_buffers, warn_of_weights
from inc_graph.quantization.kept_calls import keep_calls, kept_calls
from inc_graph.quantization.layers import own_copy
from inc_graph.quantization.left_float import left_in_graph, warn_of_left
from inc_graph.quantization.model import QuantizedModel
from inc_graph.quantization.names import warn_prefixes
from inc_graph.quantization.no_effect import warn_no_effect
from inc_graph.quantization.not_computed import NotComputed
from inc_graph.quantization.ordinary import ordinary_tensors
from inc_graph.quantization.pickling import refuse_pickling
from inc_graph.quantization.precision import all_float, fit_precision, nothing_done
from inc_graph.quantization.predicates import bind_predicates, layers_of, operators_of
from inc_graph.quantization.streaming import warn_unused
from inc_graph.quantization.trial import why_refused
from inc_graph.quantization.unquantizable import refuse_in_graph, refuse_in_modules
from inc_graph.quantization.user_algorithms import (
    Plan,
    algorithms_of,
    converted,
    has_own_algorithm,
    make_plan,
    needs_data,
    plan_of,
    remember,
    run_entries,
)
from inc_graph.recipe import Recipe, get_recipe, set_recipe
from inc_graph.registry import BACKENDS
from inc_graph.report import attribute_bytes, read_graph
from inc_graph.utils.device import choose_backend, detect_device
from inc_graph.utils.progress import progress

__all__ = ["convert", "finalize_calibration", "prepare", "quantize"]


def prepare(
    model: nn.Module | ExportedProgram,
    quant_config: BaseConfig | Mapping[str, Any],
    inplace: bool = True,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    backend: str = "auto",
) -> nn.Module:
    """Make a model ready for calibration.

    A config of a method of one's own (`inc_graph.algorithms.register_algo`) goes to its entry, with the example inputs;
    the model is not exported then, and methods of the library in the same config work layer by layer.

    Args:
        model: A graph from `export`, an `ExportedProgram`, or any module in eval mode.
        quant_config: What to quantize; it is not changed. A dictionary {algorithm: {"global": {field: value}, "local":
            {name: {field: value}}}} stands for a config.
        inplace: For a graph from `export`: True turns that graph into the prepared one, False leaves it bit-identical.
            An eager module that is exported here is never changed; one that is prepared layer by layer is, with True.
        example_inputs: Tuple, tensor or dict; with them an eager module is exported, without them its layers are
            prepared one by one and it keeps its class. A module that cannot be exported is prepared layer by layer
            too, and a warning gives the exporter's reason.
        dynamic_shapes: As for `torch.export.export`; only with `example_inputs`.
        backend: The backend that the operators are chosen for.

    Returns:
        The prepared model: run calibration data through it, then call `convert`. A `torch.compile`d or data-parallel
        model gives that of the module it wraps.

    Raises:
        ConfigError, CaptureError, PassError: nothing has been changed then.
    """
    with ordinary_tensors(model):
        quant_config = as_config(quant_config)
        if has_own_algorithm(quant_config):
            own, plan = _start_own(model, quant_config, inplace, example_inputs, dynamic_shapes)
            own = run_entries(own, plan, Mode.PREPARE)
            if plan.rest is not None:
                own = _prepare(own, plan.rest, True, None, None, backend)
            return remember(own, plan)
        if isinstance(model, str):
            quant_config.recipe("eager", None)  # a method that is not there says so first
            raise CaptureError(f"{model!r} is the name of a model", hint="load it: prepare takes the model itself")
        if isinstance(model, ExportedProgram):
            model, example_inputs, dynamic_shapes = export(model, example_inputs, dynamic_shapes), None, None
        return _prepare(unwrap(model), quant_config, inplace, example_inputs, dynamic_shapes, backend)


def _start_own(
    model: Any, quant_config: BaseConfig, inplace: bool, example_inputs: Any, dynamic_shapes: Any
) -> tuple[nn.Module, Plan]:
    """What own methods are to work on, and what each module gets."""
    if dynamic_shapes is not None:
        raise ConfigError("dynamic_shapes cannot be used here: methods of one's own work on modules, not on graphs")
    model = unwrap(model)
    plan = make_plan(model, quant_config, example_inputs)
    if plan.rest is not None:
        check_model(model)
    return model if inplace else own_copy(model), plan


def _prepare(
    model: nn.Module, quant_config: BaseConfig, inplace: bool, example_inputs: Any, dynamic_shapes: Any, backend: str
) -> nn.Module:
    if isinstance(model, nn.Module) and qat.is_prepared(model):
        raise ConfigError("the model is prepared for training already", hint="train it, then call convert")
    layerwise = example_inputs is None and not _is_ours(model)
    check_model(model, empty=layerwise)
    refuse_quantized(model)
    if dynamic_shapes is not None and (_is_ours(model) or example_inputs is None):
        why = "this graph has its shapes already" if _is_ours(model) else "they need example_inputs"
        raise ConfigError(
            f"dynamic_shapes cannot be used here: {why}", hint="give both to export(), or both to prepare()"
        )
    device = detect_device(model)
    name, note = choose_backend(backend, "cpu" if device == "meta" else device)  # its values are in a file
    if note:
        warnings.warn(note, IncWarning, stacklevel=3)
    recipe = fit_precision(quant_config.recipe(name, BACKENDS.get(name).supported()), device)
    warn_unused(model, quant_config, stacklevel=3)
    warn_no_effect(quant_config, stacklevel=3)
    asked = quant_config.predicates()
    if _is_ours(model):
        gm = cast(fx.GraphModule, model)
        return _prepare_graph(gm, bind_predicates(recipe, asked, operators_of(gm)), inplace)
    layers = bind_predicates(recipe, asked, layers_of(model))
    if example_inputs is None:
        refuse_in_modules(model, layers)
        return module_scope.prepare(model, layers, inplace, quant_config.checkpoint())
    args, kwargs = example_call(model, example_inputs)
    try:
        with progress("export") as step:
            step(type(model).__name__)
            graph = capture(model, args, kwargs, dynamic_shapes)
    except CaptureError as e:
        if dynamic_shapes is not None and _blames_shapes(e):
            raise
        if (refusal := why_refused(model, args, kwargs)) is not None:
            why = f"{type(refusal).__name__}: {refusal}"
            hint = "example_inputs must be what the model is called with"
            message = f"{type(model).__name__} does not take the example inputs: {why}"
            raise CaptureError(message, module=e.module, hint=hint) from refusal
        return _fall_back(model, layers, inplace, e)
    return _prepare_graph(graph, bind_predicates(recipe, asked, operators_of(graph)), inplace=True)


def _is_ours(model: nn.Module) -> bool:
    return isinstance(model, fx.GraphModule) and "inc" in model.meta


def _level(model: nn.Module) -> str | None:
    """The level of a graph of ours, None for other modules."""
    return get_level(cast(fx.GraphModule, model)) if _is_ours(model) else None


def _blames_shapes(error: CaptureError) -> bool:
    """Whether the export failed because of the dynamic shapes that were asked for."""
    return any(word in error.message for word in ("Constraints violated", "dynamic_shapes", "user-specified"))


def _fall_back(model: nn.Module, recipe: Recipe, inplace: bool, error: CaptureError) -> nn.Module:
    reason = str(CaptureError(error.message, node=error.node, module=error.module))
    try:
        prepared = module_scope.prepare(model, recipe, inplace)
    except ConfigError as e:
        raise ConfigError(f"{e.message}, and the whole model cannot be exported: {reason}", hint=error.hint) from error
    text = f"the whole model cannot be exported, so it is quantized layer by layer: {reason}"
    warnings.warn(text, IncWarning, stacklevel=4)
    return prepared


def _prepare_graph(model: fx.GraphModule, recipe: Recipe, inplace: bool) -> fx.GraphModule:
    refuse_in_graph(model, recipe)
    work = clone(model)
    if not inplace:
        own_mutated(work)  # calibration writes to buffers: the original keeps its own
    set_recipe(work, recipe)
    pipeline = Pipeline.parse(recipe.prepare)
    with progress("prepare", len(pipeline.passes)) as step:
        result = pipeline.run(work, on_pass=step)
    _refuse_nothing(result.graph)
    operators = [n for n in model.graph.nodes if pattern_of(n) is not None]
    warn_prefixes(recipe, filter(None, map(module_path, operators)), stacklevel=5)
    remember_buffers(result.graph)
    refuse_pickling(result.graph)
    one_batch_a_call(result.graph)
    keep_calls(result.graph, NotComputed)
    result.graph.meta["inc"]["bytes_before"] = attribute_bytes(model)
    result.graph.meta["inc"]["timings"] = [list(t) for t in result.timings]
    return adopt(model, result.graph) if inplace else result.graph


def _refuse_nothing(gm: fx.GraphModule) -> None:
    """Silence is a defect: a model in which nothing is quantized is an error that says why."""
    quantized, floats = read_graph(gm)
    if quantized or all_float(get_recipe(gm)):
        return
    reasons = list(dict.fromkeys(f"{f.op}: {f.detail}" for f in floats))
    shown = "; ".join(reasons[:5]) or "it has no operator with float inputs and weights"
    if not any(is_float(n) for n in gm.graph.nodes):
        shown = "it computes on integers only"
    raise ConfigError(f"{nothing_done(get_recipe(gm))} ({shown})", hint="see the reasons, or change the config")


def convert(
    model: nn.Module,
    quant_config: BaseConfig | Mapping[str, Any] | None = None,
    inplace: bool = True,
    *,
    backend: str | None = None,
    reference: bool = False,
    example_inputs: Any = None,
    compute_dtype: ComputeDtype = None,
) -> nn.Module:
    """Turn a prepared, calibrated model into a quantized one.

    Args:
        model: From `prepare`, after calibration data has run through it. It stays usable: more data may run through
            it, and it may be converted again.
        quant_config: Only for a model that was not prepared, and a method that needs no calibration.
        inplace: For a model prepared layer by layer: True replaces the layers in it, False gives a copy. A graph is
            always converted into a new model.
        backend: Lower to this backend instead of the one it was prepared for.
        reference: Run the Q-DQ meaning itself, on no backend (same as backend="eager").
        example_inputs: As for `prepare`, with a `quant_config`. A prepared model needs none.
        compute_dtype: What layers with quantized weights and float inputs are computed in: a dtype (float32, bfloat16,
            float16, float64) or its name; None or "auto": `INC_COMPUTE_DTYPE` if that is set, else what the machine is
            fast at. {name: dtype} says it layer by layer, with names and regular expressions as `set_local` has them.
            It is not saved.

    Returns:
        A `QuantizedModel` (graph), or the model with quantized layers (layer by layer). `.report` says what happened.

    Raises:
        CalibrationError: no data has run through the model, or through a part of it.
        ConfigError: it is not prepared, or converted already; or `compute_dtype` is none.
        With a `quant_config` the model is as it was then.
    """
    with ordinary_tensors(model):
        model = unwrap(model)
        if not isinstance(model, nn.Module):
            raise CaptureError(f"expected a prepared model, got {type(model).__name__}")
        if reference and backend not in (None, "eager"):
            raise ConfigError(f"reference=True runs on no backend, and backend={backend!r} asks for one")
        if reference:
            backend = "eager"
        if quant_config is not None and _is_prepared(model):
            warnings.warn("quant_config is not used: the model was prepared with a config", IncWarning, stacklevel=2)
        level = _level(model)
        if not _is_prepared(model):
            done = level in ("qdq", "lowered") or algorithms_of(model) is not None
            if done or any(isinstance(m, QuantizedModel) for m in model.modules()):
                raise ConfigError(
                    "the model is converted already", hint="give the float model, or the result of prepare"
                )
            if quant_config is None:
                raise ConfigError(
                    "the model is not prepared",
                    hint="prepared = prepare(model, config), run data, then convert(prepared)",
                )
            quant_config = as_config(quant_config)
            if needs_data(quant_config):
                raise ConfigError(
                    f"{type(quant_config).__name__} needs calibration data, so the model must be prepared first",
                    hint="use prepare, run data, convert; or quantize(model, config, run_fn=...)",
                )
            ComputeDtypes.of(compute_dtype)  # says what is wrong with it before anything is changed
            graph = _is_ours(model)
            prepared = prepare(model, quant_config, inplace and not graph, example_inputs, backend=backend or "auto")
            try:
                return convert(prepared, compute_dtype=compute_dtype)
            except BaseException:
                if module_scope.is_prepared(prepared):
                    module_scope.undo(prepared)
                raise
        with chosen(model, compute_dtype) as choice:
            if qat.is_prepared(model):
                made = qat.convert(model, backend, inplace)
            elif (plan := plan_of(model)) is not None:
                if plan.rest is not None:
                    model = module_scope.convert(model, backend, inplace)
                elif not inplace:
                    model = own_copy(model)
                made = converted(run_entries(model, plan, Mode.CONVERT), plan)
            elif level == "observed":
                graph_module = cast(fx.GraphModule, model)
                made = finish(graph_module, backend)
                warn_of_weights(made.report)
                warn_of_left(left_in_graph(graph_module, made.report.floats), get_recipe(graph_module), made.report)
            else:
                made = module_scope.convert(model, backend, inplace)
        choice.tell(made)
        return made


def _is_prepared(model: nn.Module) -> bool:
    known = plan_of(model) is not None or _level(model) == "observed" or module_scope.is_prepared(model)
    return known or qat.is_prepared(model)


def quantize(
    model: nn.Module | ExportedProgram,
    quant_config: BaseConfig | Mapping[str, Any],
    run_fn: Callable[..., Any] | None = None,
    run_args: Any = None,
    inplace: bool = True,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    backend: str = "auto",
    compute_dtype: ComputeDtype = None,
) -> nn.Module:
    """`prepare`, `run_fn(prepared, *run_args)`, `convert` in one call. Arguments and errors as theirs.

    A graph from `export` is never changed; a model quantized layer by layer is, with `inplace=True`, once all has gone
    well.

    Raises:
        ConfigError: if `run_fn` is missing though the method needs calibration data.
        Whatever `run_fn` raises: the model is as it was then.
    """
    with ordinary_tensors(model):
        quant_config = as_config(quant_config)
        if run_fn is None and needs_data(quant_config):
            raise ConfigError(
                "this method needs calibration data", hint="pass run_fn, a function that runs data through the model"
            )
        if run_fn is not None and not callable(run_fn):
            raise ConfigError(f"run_fn must be a function that runs data through the model, not {run_fn!r}")
        choice = ComputeDtypes.of(compute_dtype)  # says what is wrong with it before anything is changed
        if has_own_algorithm(quant_config):
            own, plan = _start_own(model, quant_config, inplace, example_inputs, dynamic_shapes)
            own = run_entries(own, plan, Mode.QUANTIZE, run_fn=run_fn, run_args=run_args)
            if plan.rest is not None:
                own = quantize(own, plan.rest, run_fn, run_args, backend=backend, compute_dtype=compute_dtype)
            else:
                choice.tell(own)
            return converted(own, plan)
        run_fn = run_fn or _no_data
        graph = isinstance(model, nn.Module) and _is_ours(model)
        prepared = prepare(
            model, quant_config, inplace and not graph, example_inputs, dynamic_shapes=dynamic_shapes, backend=backend
        )
        args = () if run_args is None else run_args if isinstance(run_args, tuple | list) else (run_args,)
        try:
            run_fn(prepared, *args)
            return convert(prepared, compute_dtype=compute_dtype)
        except BaseException:
            if module_scope.is_prepared(prepared):
                module_scope.undo(prepared)
            raise


def _no_data(model: nn.Module) -> None:
    """Calibration of a method that needs none."""


def finalize_calibration(model: nn.Module) -> None:
    """End calibration: observers stop collecting, and ranges stay as they are.

    Raises:
        ConfigError: if the model is not prepared.
        CalibrationError: if an observed value saw no data; names it. (Layer by layer: only if no layer saw any.)
    """
    if not isinstance(model, nn.Module) or not (observers := observers_of(model)):
        if isinstance(model, nn.Module) and plan_of(model) is not None:
            raise ConfigError("the methods of this model keep their own statistics", hint="go on with convert")
        raise ConfigError("the model is not prepared, so there is no calibration to end")
    stopped, kept = block_inputs_of(model), kept_calls(model)
    if kept is not None and kept.calls:
        observers = [o for o in observers if not isinstance(o, GramObserver)]
    elif stopped is not None and stopped.calls:
        stopped.closed = True
    elif not any(o.elements for o in observers):
        raise no_data()
    for observer in observers:
        if observer.elements or not module_scope.is_prepared(model):
            observer.calculate_qparams()
    for module in model.modules():
        if isinstance(module, Observer | MeanObserver | GramObserver | ChannelObserver):
            module.enabled = False
