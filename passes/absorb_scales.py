"""Who in a model takes the scales of layers in, where the model itself is not a graph. observed -> observed.

A model that is quantized layer by layer is exported to look at it: the graph has channel observers at the inputs of
layers, with what was seen of them. Sites, groups and alphas are found as `smooth-quant` finds them; but nothing is
rewritten. What parameters have to be multiplied by is left in the `meta` of the graph, for those values whose producers
can take the scale in as they are: each parameter stays one, and no norm is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from inc_graph.channel_stats import CALLS
from inc_graph.errors import PassError
from inc_graph.graph import get_tensor, module_path, view_key
from inc_graph.oppattern import argument, pattern_of
from inc_graph.passes._bare import forget_decisions, remove_observers
from inc_graph.passes._channels import ways
from inc_graph.passes._smooth_choice import choose
from inc_graph.passes._smooth_sites import Group, find_sites, grouped, weight_index
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.registry import PASSES
from inc_graph.smooth_report import SmoothLine
from inc_graph.smoothing import ABSORBED, WHY, Absorbed

__all__ = ["AbsorbScales"]


@PASSES.register("absorb-scales")
@dataclass(frozen=True)
class AbsorbScales(Pass):
    """Find scales that constants of a graph can take in; nothing is scaled."""

    name: ClassVar[str] = "absorb-scales"
    requires: ClassVar[str] = "observed"
    ensures: ClassVar[str] = "observed"

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        report, recalls = PassReport(), gm.meta.pop(CALLS, None)
        sites, changed = find_sites(gm), bool(gm.graph.find_nodes(op="call_module"))
        remove_observers(gm)
        forget_decisions(gm)
        groups = grouped(gm, sites, copies=False)
        choose(gm, groups, recalls)
        found: list[Absorbed] = []
        why = {module_path(n): s.reason for g in groups for s in g.sites for n in s.layers if s.reason}
        readers = _readers(gm)
        for group in (g for g in groups if g.scale is not None and all(s.plan is not None for s in g.sites)):
            factors = _factors(gm, group, readers)
            layers = [n for s in group.sites for n in s.layers]
            if isinstance(factors, str):
                why.update({module_path(n): factors for n in layers})
                continue
            report.matched += [n.name for n in layers]
            found += _records(group, factors)
        report.missed = list(why.items())
        gm.meta[ABSORBED], gm.meta[WHY] = found, why
        return PassResult(gm, changed, report)


def _records(group: Group, factors: dict[str, Tensor]) -> Iterator[Absorbed]:
    """One for each site; the factors are with the first of them."""
    scale = group.scale
    assert scale is not None
    largest = float(scale.max() / scale.log().mean().exp())
    layers = tuple(module_path(n) for s in group.sites for n in s.layers)
    for site in group.sites:
        own = tuple(module_path(n) for n in site.layers)
        takers = tuple(dict.fromkeys(module_path(n) or n.name for n in site.plan.takers))  # type: ignore[union-attr]
        line = SmoothLine(own, group.alpha, "absorbed", takers, "", largest, group.error, group.plain)
        yield Absorbed(own, layers, line, scale, factors if site is group.sites[0] else {})


# --------------------------------------------------------------------------------------------------------- parameters
_Place = tuple[fx.Node, fx.Node]


@dataclass
class _Constant:
    """A constant; for each place where it is read (reader, node of the constant) what it is to be multiplied by there,
    and a key that tells factors apart."""

    target: str
    size: torch.Size
    factors: dict[_Place, Tensor] = field(default_factory=dict)
    keys: dict[_Place, Any] = field(default_factory=dict)


def _readers(gm: fx.GraphModule) -> dict[Any, set[_Place]]:
    """All that read each constant, under whatever name."""
    found: dict[Any, set[_Place]] = {}
    for read in gm.graph.find_nodes(op="get_attr"):
        if isinstance(read.meta.get("val"), Tensor):
            found.setdefault(view_key(get_tensor(gm, read)), set()).update((user, read) for user in read.users)
    return found


def _factors(gm: fx.GraphModule, group: Group, readers: dict[Any, set[_Place]]) -> dict[str, Tensor] | str:
    """{name of a constant: what it is to be multiplied by}, or why one constant would have to be two."""
    scale = group.scale
    assert scale is not None
    wide = torch.cat([scale, scale.new_ones(1)])
    constants: dict[Any, _Constant] = {}

    def note(reader: fx.Node, read: fx.Node, index: Tensor, of: Callable[[Tensor], Tensor], key: str) -> None:
        tensor = get_tensor(gm, read)
        known = constants.setdefault(view_key(tensor), _Constant(str(read.target), tensor.shape))
        place = (reader, read)
        known.factors[place] = known.factors.get(place, torch.ones(())) * of(wide)[index]
        which = (key, tuple(index.shape), index.contiguous().numpy().tobytes())
        known.keys[place] = (*known.keys.get(place, ()), which)

    for site in group.sites:
        for layer in site.layers:
            pattern = pattern_of(layer)
            weight = argument(layer, pattern.weight)  # type: ignore[union-attr, arg-type]
            try:
                note(*_origin(layer, weight, weight_index(layer, len(scale))), lambda s: s, "in")
            except PassError as e:
                return e.message
        for edit in site.plan.edits:  # type: ignore[union-attr]
            note(edit.reader, edit.constant, edit.index, torch.reciprocal, "out")
    for key, constant in constants.items():
        one = next(iter(constant.factors.values()))
        if readers.get(key) != set(constant.factors) or len(set(constant.keys.values())) != 1:
            return f"{constant.target} is read in other ways, too"
        if torch.broadcast_shapes(one.shape, constant.size) != constant.size:
            return f"{constant.target} has one value for several channels"
    return {c.target: next(iter(c.factors.values())) for c in constants.values()}


def _origin(layer: fx.Node, weight: fx.Node, index: Tensor) -> tuple[fx.Node, fx.Node, Tensor]:
    """(reader, constant, index of the constant) of a weight, which may be moved on its way."""
    reader = layer
    while weight.op != "get_attr":
        found = ways(weight, index.expand(weight.meta["val"].shape))
        if isinstance(found, str) or len(found) != 1 or len(found[0].inputs) != 1 or found[0].ties:
            raise PassError(f"the weight of {layer.name} is computed")
        reader, ((weight, index),) = weight, found[0].inputs
    return reader, weight, index
