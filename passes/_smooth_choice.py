"""How strong the inputs of layers are scaled: by a given alpha, or by one that is searched for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from inc_graph.channel_stats import Recalls
from inc_graph.passes._smooth_blocks import Block, find_blocks
from inc_graph.passes._smooth_search import Judge, largest_inputs, largest_weights
from inc_graph.passes._smooth_sites import Group
from inc_graph.passes._smooth_whole import settle
from inc_graph.passes.qparams.smooth import Choice, search, smooth_scale

__all__ = ["choose"]


def choose(gm: fx.GraphModule, groups: Sequence[Group], recalls: Recalls | None) -> None:
    """Set the scales of all groups: one alpha for a block, their own for others; the whole model has the last word."""
    blocks = find_blocks(gm, groups, recalls)
    for block in blocks:
        _together(block)
    searched: dict[Group, Judge] = {}
    for group in groups:
        if not any(group in block.groups for block in blocks) and (judge := _alone(gm, group)) is not None:
            searched[group] = judge
    settle(gm, groups, searched, recalls)


def _alone(gm: fx.GraphModule, group: Group) -> Judge | None:
    """Set the scale of a group, if any is good; its judge, if alpha was searched for."""
    how = group.sites[0].how
    if all(s.done == "left" for s in group.sites):
        return None
    if not how.auto:
        group.alpha = float(how.alpha)
        group.scale = smooth_scale(largest_inputs(group), largest_weights(gm, group), group.alpha)
        return None
    judge = Judge(gm, group)
    _take([group], search(judge, *how.grid), [judge])
    judge.forget()
    return judge


def _together(block: Block) -> None:
    """Set the scales of the groups of a block, by one alpha."""
    _take(block.groups, search(block, *block.groups[0].sites[0].how.grid), block.judges)


def _take(groups: list[Group], found: Choice, judges: list[Judge]) -> None:
    """Go by what a search has found."""
    for group, judge in zip(groups, judges, strict=True):
        group.alpha, group.error, group.plain = found.alpha, found.error, found.tried[None]
        if found.alpha is not None:
            group.scale = judge.scale(found.alpha)
            continue
        for site in group.sites:
            site.done, site.reason = "left", "no alpha makes the error smaller"
