"""Values that are smoothed, the layers that read them, and which of them have to have one scale.

A site is a value and layers that read it: one scale for its channels. It is absorbed if a plan is found (`_absorb`);
else multiplied, by all of its layers together or, without `scale_sharing`, by each layer for itself. Sites whose
layers, or whose takers, share a weight are one group with one scale, so that the shared weight stays one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.channel_stats import ChannelObserver
from inc_graph.graph import get_attr, get_tensor, peek_meta, val, view_key
from inc_graph.oppattern import argument, pattern_of
from inc_graph.passes._absorb import Plan, Producers, classes
from inc_graph.smooth_report import SmoothLine
from inc_graph.smoothing import Smoothing
from inc_graph.spec import QSpec

__all__ = ["Format", "Group", "Site", "find_sites", "grouped", "input_index", "origin_of", "weight_index"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Format:
    """How a layer is quantized: its input (None: not) with a range estimator, and its weight's annotation."""

    activation: QSpec | None
    estimator: str
    weight: dict[str, Any]


@dataclass(eq=False)
class Site:
    """A value, and layers that read it scaled by one scale.

    Attributes:
        axis: The channels' dimension: -1 or 1.
        plan: How it is absorbed; None: it is multiplied, or left.
        reason: Why it is not absorbed.
        done: "absorbed", "multiplied" or "left".
        line: What was done to it before; nothing is left to do then.
        why: Why it is not absorbed, where more is known than the graph shows.
    """

    value: fx.Node
    axis: int
    layers: list[fx.Node]
    how: Smoothing
    stats: ChannelObserver
    formats: dict[fx.Node, Format]
    plan: Plan | None = None
    reason: str = ""
    done: str = ""
    line: SmoothLine | None = None
    why: str = ""

    @property
    def channels(self) -> int:
        return len(self.stats.ranges()[0])


@dataclass(eq=False)
class Group:
    """Sites with one scale, float32 [channels] once it is chosen. `same`: see `_absorb.classes`."""

    sites: list[Site]
    same: Tensor
    scale: Tensor | None = None
    alpha: float | None = None
    error: float | None = None
    plain: float | None = None

    def together(self, x: Tensor) -> Tensor:
        """The largest value of all channels that need one scale, for each: float32 [channels]."""
        return x.clone().scatter_reduce_(0, self.same, x, "amax")[self.same]


def origin_of(node: fx.Node) -> fx.Node:
    """What a value is, before views that give it the shape that it had."""
    while node.target in (aten.view.default, aten.reshape.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if val(source).ndim != val(node).ndim or val(source).shape[-1] != val(node).shape[-1]:
            break
        node = source
    return node


def input_index(layer: fx.Node, axis: int, channels: int) -> Tensor:
    """The index (see `_channels`) of a layer's input."""
    rank = layer.args[0].meta["val"].ndim  # type: ignore[union-attr]
    return torch.arange(channels).view([-1 if d == axis % rank else 1 for d in range(rank)])


def weight_index(layer: fx.Node, channels: int) -> Tensor:
    """Which input channel each entry of a layer's weight multiplies; broadcasts against the weight."""
    pattern = pattern_of(layer)
    assert pattern is not None and pattern.weight is not None
    sizes = argument(layer, pattern.weight).meta["val"].shape
    kernel = [1] * (len(sizes) - 2)
    if pattern.axis(layer) == 1:  # transposed: [in, out, *kernel]
        return torch.arange(channels).view(-1, 1, *kernel)
    groups = channels // sizes[1]
    if groups == 1:
        return torch.arange(channels).view(1, -1, *kernel)
    return torch.arange(channels).view(groups, -1).repeat_interleave(sizes[0] // groups, 0).view(*sizes[:2], *kernel)


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """The sites of an observed graph with channel observers, in its order; none has a plan yet."""
    found: dict[Any, Site] = {}
    for layer in gm.graph.nodes:
        if (notes := peek_meta(layer).get("smooth")) is None:
            continue
        watch: Any = layer.args[0]
        stats: ChannelObserver = get_attr(gm, notes["watch"])
        key = (watch, notes["how"])
        if key not in found:
            found[key] = Site(watch.args[0], stats.axis, [], Smoothing.parse(notes["how"]), stats, {})
            found[key].line = SmoothLine.from_json(notes["line"]) if "line" in notes else None
            found[key].why = notes.get("why", "")
        found[key].layers.append(layer)
        found[key].formats[layer] = _format(layer, watch.args[0])
    return list(found.values())


def _format(layer: fx.Node, value: fx.Node) -> Format:
    notes = peek_meta(layer)
    weight = {k: notes["weight"][k] for k in ("spec", "algorithm", "correct_bias") if k in notes["weight"]}
    key = notes.get("reads", {}).get(value.name)
    if key is None:
        return Format(None, "", weight)
    quant = peek_meta(value)["quant"][key]
    return Format(QSpec.from_json(quant["spec"]), quant["algorithm"], weight)


def _own_sites(site: Site) -> list[Site]:
    """A site that is multiplied, as its config wants it: one for all layers, or one for each."""
    if site.how.scale_sharing or len(site.layers) == 1:
        return [site]
    return [replace(site, layers=[n], formats={n: site.formats[n]}) for n in site.layers]


def grouped(gm: fx.GraphModule, sites: Iterable[Site], copies: bool = True) -> list[Group]:
    """Find a plan for each site of a float graph, and the groups. A site without a plan that is not to be multiplied is
    left, with its reason. `copies`: see `Producers`."""
    producers, split = Producers(gm, copies), list[Site]()
    for site in sites:
        if site.line is not None:
            site.done = "left"
            split.append(site)
            continue
        plan = producers.plan(site.value, {n: input_index(n, site.axis, site.channels) for n in site.layers})
        if isinstance(plan, Plan) and isinstance(same := classes(plan.ties, site.channels), str):
            plan = same
        if isinstance(plan, Plan) and plan.ties and site.channels > 1 and not isinstance(same, str) and not same.any():
            plan = "all channels would need one scale"
        if isinstance(plan, Plan):
            site.plan, site.done = plan, "absorbed"
            split.append(site)
            continue
        site.reason = site.why or plan
        for own in [site] if site.how.folding else _own_sites(site):
            own.done = "left" if site.how.folding else "multiplied"
            split.append(own)
    return _merge(gm, split)


def _merge(gm: fx.GraphModule, sites: list[Site]) -> list[Group]:
    """Sites of one group for each weight that several of them have in common."""
    group: dict[Site, list[Site]] = {s: [s] for s in sites}
    owner: dict[Any, Site] = {}
    for site in sites:
        for key in _weights(gm, site) if site.done != "left" else ():
            other = owner.setdefault(key, site)
            if group[other] is not group[site]:
                merged = group[other] + group[site]
                ties = [t for s in merged if s.plan for t in s.plan.ties]
                if not isinstance(classes(ties, site.channels), str):
                    for member in merged:
                        group[member] = merged
    found = list({id(g): g for g in group.values()}.values())
    return [Group(g, _same(g)) for g in found]


def _same(sites: list[Site]) -> Tensor:
    found = classes([t for s in sites if s.plan for t in s.plan.ties], sites[0].channels)
    assert not isinstance(found, str)
    return found


def _weights(gm: fx.GraphModule, site: Site) -> list[Any]:
    """Keys of the weights that a site's scale is put into; equal where it would be put in, in the same way."""
    found: list[Any] = []
    for layer in site.layers:
        pattern = pattern_of(layer)
        weight = argument(layer, pattern.weight)  # type: ignore[union-attr, arg-type]
        found.append(("in", _memory(gm, weight), site.channels, str(site.how)))
    for edit in site.plan.edits if site.plan else ():
        if edit.reader not in site.plan.copies:  # type: ignore[union-attr]
            where = (tuple(edit.index.shape), edit.index.contiguous().numpy().tobytes())
            found.append(("out", _memory(gm, edit.constant), site.channels, where, str(site.how)))
    return found


def _memory(gm: fx.GraphModule, read: fx.Node) -> Any:
    return view_key(get_tensor(gm, read))
