"""Smoothing comes before all else that converts a graph: what other methods look at are the scaled inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import fx

from inc_graph.channel_stats import CALLS, ChannelObserver, Recalls
from inc_graph.gram import GramObserver
from inc_graph.passmanager import Pipeline
from inc_graph.quantization.kept_calls import KeptCalls, flat_inputs
from inc_graph.side_by_side import why_not

__all__ = ["Smoothed", "smooth_first"]

_PASS = "smooth-quant"


class Smoothed(NamedTuple):
    """The graph, what of the pipeline is left, the calls for layers that are rounded in sequence, and the times."""

    graph: fx.GraphModule
    left: Pipeline
    kept: KeptCalls | None
    timings: list[tuple[str, float]]


def smooth_first(
    gm: fx.GraphModule, pipeline: Pipeline, kept: KeptCalls | None, step: Callable[[str], None]
) -> Smoothed:
    """Run a pipeline up to and with the pass that smooths, if the observed graph `gm` has inputs that are to be."""
    names = [p.name for p in pipeline.passes]
    if _PASS not in names or not any(isinstance(m, ChannelObserver) for m in gm.modules()):
        return Smoothed(gm, pipeline, kept, [])
    end = names.index(_PASS) + 1
    reason = why_not(gm)
    if kept is not None and kept.calls:
        gm.meta[CALLS] = Recalls([flat_inputs(gm, *call) for call in kept.each()], grams=bool(reason))
    result = Pipeline(pipeline.passes[:end]).run(gm, on_pass=step)
    sequence = None
    if kept is not None and any(isinstance(m, GramObserver) for m in result.graph.modules()):
        sequence = KeptCalls(None, reason)
        sequence.calls = kept.calls
    return Smoothed(result.graph, Pipeline(pipeline.passes[end:]), sequence, result.timings)
