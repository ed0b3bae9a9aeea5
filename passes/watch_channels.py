"""Watch the inputs of the layers that will be smoothed, channel by channel; everything else is observed afterwards.

    value --> channel observer --> layers

Scaling changes what other observers would see, so these are taken out again: `smooth-quant` puts new ones into the
scaled graph, and runs the calibration data through it once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from inc_graph.channel_stats import ChannelObserver
from inc_graph.graph import inc_meta, module_path, peek_meta, replace_uses, set_level, set_module
from inc_graph.oppattern import named, pattern_of
from inc_graph.passes._absorb import Producers
from inc_graph.passes._bare import remove_observers
from inc_graph.passes._channels import NoWeight
from inc_graph.passes._place import behind, head, stamp
from inc_graph.passes._smooth_sites import input_index, origin_of
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.recipe import get_recipe, smoothing_of
from inc_graph.registry import PASSES
from inc_graph.smoothing import FoldingError, Smoothing

__all__ = ["WatchChannels"]


@PASSES.register("watch-channels")
@dataclass(frozen=True)
class WatchChannels(Pass):
    """Put channel observers on the inputs of layers that a rule wants smoothed."""

    name: ClassVar[str] = "watch-channels"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "observed")
    ensures: ClassVar[str] = "observed"

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        recipe, wanted = get_recipe(gm), dict[fx.Node, Smoothing]()
        for node in gm.graph.nodes:
            pattern = pattern_of(node)
            if pattern is None or pattern.weight is None or "weight" not in peek_meta(node) or not pattern.inputs:
                continue
            if (text := smoothing_of(recipe, named(node, pattern))) is not None:
                wanted[node] = Smoothing.parse(text)
        set_level(gm, "observed")
        if not wanted:
            return PassResult(gm, False, report)
        remove_observers(gm)
        first, watched = head(gm), dict[tuple[fx.Node, int], list[fx.Node]]()
        for node, how in wanted.items():
            inc_meta(node)["smooth"] = {"how": str(how)}
            axis = -1 if inc_meta(node)["op"] == "linear" else 1
            watched.setdefault((node.args[0], axis), []).append(node)  # type: ignore[arg-type]
        _refuse_norms_without_weight(gm, watched, wanted)
        for (value, axis), layers in watched.items():
            needed = origin_of(value).op == "placeholder" or any(wanted[n].auto for n in layers)
            samples = max(wanted[n].n_samples for n in layers) if needed else 0
            observer = ChannelObserver(axis, samples, layers[0].name, module_path(layers[0]))
            name = set_module(gm, f"channels_{value.name}", observer)
            with behind(gm, value, first):
                call = gm.graph.create_node("call_module", name, (value,), {})
            call.meta["val"] = value.meta["val"]
            stamp(call, value)
            replace_uses(value, call, only=layers)
            for layer in layers:
                inc_meta(layer)["smooth"]["watch"] = name
            report.matched += [layer.name for layer in layers]
        return PassResult(gm, True, report)


def _refuse_norms_without_weight(
    gm: fx.GraphModule, watched: dict[tuple[fx.Node, int], list[fx.Node]], wanted: dict[fx.Node, Smoothing]
) -> None:
    """`folding=True` promises that a producer takes the scale in: say early which norm never can."""
    producers = Producers(gm)
    for (value, axis), layers in watched.items():
        folded = [n for n in layers if wanted[n].folding]
        if not folded:
            continue
        channels = value.meta["val"].shape[axis]
        found = producers.plan(value, {n: input_index(n, axis, channels) for n in folded})
        if isinstance(found, NoWeight):
            raise FoldingError(
                f"SmoothQuant with folding=True cannot smooth {folded[0].name}: {found}",
                node=folded[0],
                module=module_path(folded[0]),
                hint="folding=False multiplies its input instead; set_local can say so for this layer alone",
            )
