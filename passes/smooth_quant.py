"""SmoothQuant: outliers of activations move into the weights before both are quantized. observed -> observed.

    X W^T = (X / s) (W s)^T        s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)

(Xiao et al. 2022, arXiv:2211.10438.) The graph has channel observers at the layers' inputs (`watch-channels`). For
each input: who can take `1 / s` in (`_absorb`), else a multiplication; how strong (`qparams/smooth`); the rewrite. The
function of the float model does not change. Then the scaled graph is annotated, observed and calibrated as if it had
been the model from the start, with the calls that were kept, or with what the channel observers know
where there are none.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.channel_stats import CALLS, Recalls
from inc_graph.errors import IncWarning, PassError
from inc_graph.graph import module_path, set_level, take_fuel
from inc_graph.passes._bare import forget_decisions, remove_observers
from inc_graph.passes._rerun import rerun
from inc_graph.passes._smooth_apply import Edits
from inc_graph.passes._smooth_choice import choose
from inc_graph.passes._smooth_sites import Group, Site, find_sites, grouped, origin_of
from inc_graph.passes.annotate import Annotate
from inc_graph.passes.fold_constants import fold_factors
from inc_graph.passes.insert_observers import InsertObservers
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.smooth_report import KEY, SmoothLine

__all__ = ["SmoothQuant"]


@PASSES.register("smooth-quant")
@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Smooth the watched inputs of layers, and calibrate what comes of it."""

    name: ClassVar[str] = "smooth-quant"
    requires: ClassVar[str] = "observed"
    ensures: ClassVar[str] = "observed"

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        recalls: Recalls | None = gm.meta.pop(CALLS, None)
        sites = find_sites(gm)
        if not sites:
            return PassResult(gm, False, report)
        for site in sites:
            site.stats.ranges()  # raises, with the names
        remove_observers(gm)
        forget_decisions(gm)
        set_level(gm, "float")
        fold_factors(gm)
        groups = grouped(gm, sites)
        edits = Edits(gm)
        choose(gm, groups, recalls)
        for group in groups:
            if group.scale is None:
                continue
            if take_fuel():
                edits.add(group)
                continue
            group.scale = None
            for site in group.sites:
                site.done, site.reason = "left", "there is no fuel left"
        edits.apply()
        lines = [_line(site, group, edits) for group in groups for site in group.sites]
        gm.meta["inc"][KEY] = [line.to_json() for line in lines]
        report.matched = [name for line in lines if line.by != "left" for name in line.layers]
        report.missed = [(name, line.detail) for line in lines if line.by == "left" for name in line.layers]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncWarning)  # prepare has said it
            Annotate().run(gm)
        InsertObservers().run(gm)
        _calibrate(gm, sites, groups, recalls)
        return PassResult(gm, True, report)


def _line(site: Site, group: Group, edits: Edits) -> SmoothLine:
    if site.line is not None:
        return site.line
    layers = tuple(module_path(n) or n.name for n in site.layers)
    if site.done == "left" or group.scale is None:
        return SmoothLine(layers, None, "left", detail=site.reason, error=group.error, plain=group.plain)
    takers = edits.takers.get(site, [])
    notes = [f"copy of {name}" for name in edits.copied.get(site, [])]
    notes = ([site.reason] if site.plan is None else []) + notes + edits.parted.get(site, [])
    detail = "; ".join(dict.fromkeys(notes))
    scale = group.scale
    largest = float(scale.max() / scale.log().mean().exp())
    names = tuple(dict.fromkeys(module_path(n) or n.name for n in takers))
    return SmoothLine(layers, group.alpha, site.done, names, detail, largest, group.error, group.plain)


# --------------------------------------------------------------------------------------------------------- calibration
def _calibrate(gm: fx.GraphModule, sites: list[Site], groups: list[Group], recalls: Recalls | None) -> None:
    if recalls is not None and recalls.calls:
        rerun(gm, recalls.calls, grams=recalls.grams)
        return
    inputs = gm.graph.find_nodes(op="placeholder")
    if not any(gm.graph.find_nodes(op="call_module")):
        return
    (site,) = sites if len(sites) == 1 else (None,)
    if site is None or list(inputs) != [origin_of(site.value)]:
        raise PassError("there are no calls to calibrate the smoothed graph with")
    rows, ranges = _known(site)
    rerun(gm, rows)
    rerun(gm, ranges, ranges_only=True)


def _known(site: Site) -> tuple[list[Any], list[Any]]:
    """Calls that bring a layer's kept inputs; and its least and greatest values."""
    like = site.value.meta["val"]
    low, high = (t.to(like.dtype) for t in site.stats.ranges())
    kept = [x.to(like.dtype) for x in site.stats.kept()]
    if site.axis == -1:
        lead = [1] * (like.ndim - 2)
        return [[x.view(*lead, *x.shape)] for x in kept], [[t.view(*lead, 1, -1)] for t in (low, high)]
    ends = [t.view(1, -1, *[1] * (like.ndim - 2)).expand_as(kept[0]) for t in (low, high)]
    return [[x] for x in kept], [[t] for t in ends]
