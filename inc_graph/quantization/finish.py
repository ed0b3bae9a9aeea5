"""From the observed graph to the model that users get: convert pipeline, lowering, report."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace

from torch import fx, nn

from inc_graph.batches import no_batches
from inc_graph.calibrate import Observer
from inc_graph.capture import own_mutated
from inc_graph.channel_stats import ChannelObserver
from inc_graph.errors import CalibrationError, IncWarning
from inc_graph.gram import GramObserver
from inc_graph.graph import clone, get_tensor, mutated_attrs, peek_meta
from inc_graph.in_sequence import InSequence
from inc_graph.passmanager import Pipeline
from inc_graph.plain import plain
from inc_graph.quantization.graph_in_sequence import IN_FLOAT, begin, layers_in
from inc_graph.quantization.kept_calls import forget_calls, kept_calls
from inc_graph.quantization.model import QuantizedModel
from inc_graph.quantization.smoothing import smooth_first
from inc_graph.quantization.tied import tied_in_graph
from inc_graph.recipe import get_recipe
from inc_graph.registry import BACKENDS
from inc_graph.report import Report, attribute_bytes, read_graph, with_activations
from inc_graph.utils.device import choose_backend
from inc_graph.utils.progress import progress
from inc_graph.weight_report import low_ranks, raised_dampings, weight_lines

__all__ = ["assemble", "finish", "lower", "no_data", "observers_of", "remember_buffers", "warn_of_weights"]

INITIAL = "inc_initial"


def observers_of(model: nn.Module) -> list[Observer | GramObserver | ChannelObserver]:
    """The observers in a prepared model, each of which has to see data."""
    return [m for m in model.modules() if isinstance(m, Observer | GramObserver | ChannelObserver)]


def no_data() -> CalibrationError:
    """The error of a prepared model that was never called."""
    hint = "call it on representative inputs first: for x in data: prepared(x)"
    return CalibrationError("the prepared model has seen no calibration data", hint=hint)


def _fresh(observed: fx.GraphModule) -> fx.GraphModule:
    """A copy whose written buffers are its own, and as they were before calibration ran."""
    gm = clone(observed)
    no_batches(gm)
    forget_calls(gm)
    own_mutated(gm)
    for path, value in gm.meta.pop(INITIAL, {}).items():
        get_tensor(gm, path).copy_(value)
    return gm


def remember_buffers(gm: fx.GraphModule) -> None:
    """Note the values of the buffers that the graph writes to, before calibration changes them."""
    gm.meta[INITIAL] = {path: get_tensor(gm, path).clone() for path in sorted(mutated_attrs(gm))}


def finish(observed: fx.GraphModule, backend: str | None = None, show: bool | None = None) -> QuantizedModel:
    """Convert and lower an observed graph, which is left as it was.

    Raises:
        CalibrationError: if an observed value saw no data; names it.
    """
    recipe = get_recipe(observed)
    name, _ = choose_backend(backend or recipe.backend)
    kept = kept_calls(observed)
    waiting = kept is not None and bool(kept.calls)
    observers = observers_of(observed)
    empty = [o for o in observers if not o.elements and not (waiting and isinstance(o, GramObserver))]
    if empty and len(empty) == len(observers):
        raise no_data()
    for observer in empty:
        observer.calculate_qparams()  # raises, with the names
    pipeline = Pipeline.parse(recipe.convert)
    total = len(pipeline.passes) + 1 + (layers_in(observed) if waiting else 0)
    with progress("convert", total, show) as step:
        smoothed = smooth_first(_fresh(observed), pipeline, kept, step)
        sequence = begin(smoothed.graph, smoothed.kept, step)
        result = smoothed.left.run(smoothed.graph, on_pass=step, recompile=False)  # the Q-DQ graph does not run
        step(f"lower to {name}")
        facts = observed.meta["inc"]
        timings = [*map(tuple, facts.get("timings", [])), *smoothed.timings, *result.timings]
        reason = sequence if isinstance(sequence, str) else ""
        if isinstance(sequence, InSequence):
            timings.append(("calibrate", sequence.seconds))  # a part of what the passes took
            del sequence  # and what its calls still hold
        model = assemble(result.graph, name, recipe.method, timings, facts.get("bytes_before", 0))
        model.report.notes += tied_in_graph(observed)
        if reason:
            model.report.notes.append(f"{IN_FLOAT}: {reason}")
        return model


def warn_of_weights(report: Report) -> None:
    """Say which layers had too little calibration data for what was done to them, and what that has led to."""
    if (text := raised_dampings(report.weights)) is not None:
        report.notes.append(text)
        warnings.warn(f"{text}; the damping of each is in the report", IncWarning, stacklevel=4)
    if (text := low_ranks(report.weights)) is not None:
        warnings.warn(f"{text}; run more data through the prepared model", IncWarning, stacklevel=4)


def assemble(
    qdq: fx.GraphModule, backend: str, method: str, timings: list[tuple[str, float]], bytes_before: int
) -> QuantizedModel:
    """Lower a Q-DQ graph, which is taken over, and make the model with its report.

    Args:
        qdq: As `QuantizedModel` wants it.
        backend: Name of one that can run here.
        method, timings, bytes_before: For the report.
    """
    start = time.perf_counter()
    target = BACKENDS.get(backend)
    with plain():
        lowered = target.lower(qdq)
    report = Report(method, backend, bytes_before=bytes_before)
    report.timings = [*timings, ("lower", time.perf_counter() - start)]
    quantized, report.floats = read_graph(qdq)
    report.weights = weight_lines(qdq)
    kernels, absorbed = lowered.report.kernels, lowered.report.absorbed
    default = (
        "the reference backend has no kernels"
        if target.capabilities is None
        else f"backend '{backend}' has no kernel for it"
    )
    halves = {n.name: str(half) for n in qdq.graph.nodes if (half := peek_meta(n).get("half")) is not None}
    for line in quantized:
        if line.name in halves and line.name not in kernels and line.name not in absorbed:
            report.kernels.append(replace(line, detail=halves[line.name]))
        elif line.name in kernels:
            report.kernels.append(replace(line, detail=kernels[line.name][0]))
        elif line.name in absorbed:
            report.kernels.append(replace(line, detail=f"fused into {kernels[absorbed[line.name]][0]}"))
        else:
            _, reason = lowered.report.missed.get(line.name, ("", default))
            report.reference.append(replace(line, detail=reason))
    done = {line.name for line in report.kernels}
    report.floats = with_activations(report.floats, qdq, lowered.graph, done, lowered.report.apart)
    model = QuantizedModel(qdq, lowered.graph, report, lowered.packed, target.for_compile(lowered.graph))
    report.bytes_after = attribute_bytes(model)
    return model


def lower(gm: fx.GraphModule, backend: str = "auto") -> fx.GraphModule:
    """Lower a Q-DQ graph to a backend's executable graph; the Q-DQ graph is not changed.

    Raises:
        LoweringError: if the graph is not at level "qdq", or an explicit backend cannot run here.
        UnknownNameError: if there is no such backend.
    """
    with plain():
        return BACKENDS.get(choose_backend(backend)[0]).lower(gm).graph
