"""From the observed graph to the model that users get: convert pipeline, lowering, report."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import fx

from inc_graph.graph import clone
from inc_graph.passmanager import Pipeline
from inc_graph.quantization.model import QuantizedModel
from inc_graph.recipe import get_recipe
from inc_graph.registry import BACKENDS
from inc_graph.report import Report, attribute_bytes, read_graph
from inc_graph.utils.device import choose_backend

__all__ = ["finish", "lower"]


def finish(observed: fx.GraphModule, backend: str | None = None) -> QuantizedModel:
    """Convert and lower an observed graph, which is left as it was."""
    recipe = get_recipe(observed)
    name, _ = choose_backend(backend or recipe.backend)
    result = Pipeline.parse(recipe.convert).run(clone(observed))
    start = time.perf_counter()
    target = BACKENDS.get(name)
    lowered = target.lower(result.graph)
    facts = observed.meta["inc"]
    report = Report(recipe.method, name)
    report.timings = [*map(tuple, facts.get("timings", [])), *result.timings, ("lower", time.perf_counter() - start)]
    quantized, report.floats = read_graph(result.graph)
    kernels, absorbed = lowered.report.kernels, lowered.report.absorbed
    for line in quantized:
        if line.name in kernels:
            report.kernels.append(replace(line, detail=kernels[line.name][0]))
        elif line.name in absorbed:
            report.kernels.append(replace(line, detail=f"fused into {kernels[absorbed[line.name]][0]}"))
        else:
            _, reason = lowered.report.missed.get(line.name, ("", f"backend '{name}' has no kernel for this form"))
            report.reference.append(replace(line, detail=reason))
    model = QuantizedModel(result.graph, lowered.graph, report, lowered.packed)
    report.bytes_before = facts.get("bytes_before", 0)
    report.bytes_after = attribute_bytes(model)
    return model


def lower(gm: fx.GraphModule, backend: str = "auto") -> fx.GraphModule:
    """Lower a Q-DQ graph to a backend's executable graph; the Q-DQ graph is not changed.

    Raises:
        LoweringError: if the graph is not at level "qdq", or an explicit backend cannot run here.
        UnknownNameError: if there is no such backend.
    """
    return BACKENDS.get(choose_backend(backend)[0]).lower(gm).graph
