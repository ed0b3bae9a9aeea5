"""The alphas of all layers together, by the error of what the model gives.

The search looks at a layer at a time, on inputs without an error. How errors add up on their way to the results it does
not see, and alphas that are best one by one can be worse than one for all: SmolLM2 with static ranges has a perplexity
of 24.1 with the first, 23.8 with 0.8. So the model is run, all smoothed layers scaled and rounded, on a few calls, with

    the layers' own alphas; nothing scaled;
    one alpha for all: the middle one of these, and on from there as long as the error falls;
    a quarter, a half and three quarters of the way between the two,

and the least error counts. Layers that are better not scaled stay so. Static ranges are those of all calls but the one
that is run: the stronger the scaling, the more a value counts that only one call has.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from inc_graph.channel_stats import Recalls, Without
from inc_graph.graph import get_tensor, mutated_attrs
from inc_graph.passes._smooth_blocks import some_calls
from inc_graph.passes._smooth_search import Judge, run_rounded
from inc_graph.passes._smooth_sites import Group, Site

__all__ = ["Whole", "settle"]

_BYTES = 1 << 28  # of float results that are kept
_CALLS = 4
Alphas = tuple[float | None, ...]


class Whole:
    """The error of a model's results, relative to them, as a function of the alphas of its groups.

    Args:
        gm: The float graph.
        groups: Groups with an alpha that was searched for, and their judges.
        fixed: Groups with another scale.
        calls: A value for each placeholder, for each call; all of them, in their order.
        samples: Entries of the first dimension that are enough.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        groups: Sequence[tuple[Group, Judge]],
        fixed: Sequence[Group],
        calls: Sequence[Sequence[Any]],
        samples: int,
    ) -> None:
        self.gm, self.groups, self.fixed = gm, list(groups), list(fixed)
        self.written = {name: get_tensor(gm, name).clone() for name in mutated_attrs(gm)}
        self.runs: list[tuple[Sequence[Any], Without, list[Tensor]]] = []
        size = 0
        for i, call in enumerate(some_calls(calls, samples)[:_CALLS]):
            results = self._run(call, Without(i), {})
            self.runs.append((call, Without(i), results))
            size += sum(y.nbytes for y in results)
            if size > _BYTES:
                break
        self.power = sum(float(y.square().sum()) for _, _, results in self.runs for y in results)
        self.tried: dict[Alphas, float] = {}

    def __call__(self, alphas: Alphas) -> float:
        """The error; what was asked before is not computed again."""
        if alphas not in self.tried:
            rounded: dict[fx.Node, tuple[Site, Tensor]] = {}
            for (group, judge), alpha in zip(self.groups, alphas, strict=True):
                scale = judge.scale(alpha)
                rounded.update({n: (s, scale) for s in group.sites for n in s.layers})
            for group in self.fixed:
                if (own := group.scale) is not None:
                    rounded.update({n: (s, own) for s in group.sites for n in s.layers})
            error = 0.0
            for call, share, want in self.runs:
                got = self._run(call, share, rounded)
                error += sum(float((a - b).square().sum()) for a, b in zip(want, got, strict=True))
            self.tried[alphas] = error / self.power
        return self.tried[alphas]

    def _run(self, call: Sequence[Any], share: Without, rounded: dict[fx.Node, tuple[Site, Tensor]]) -> list[Tensor]:
        class Rounded(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n not in rounded:
                    return super().run_node(n)
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                return run_rounded(n, args, kwargs, *rounded[n], share=share)

        try:
            results = Rounded(self.gm).run(*call, enable_io_processing=False)
        finally:
            for name, value in self.written.items():
                get_tensor(self.gm, name).copy_(value)
        leaves = [y for y in pytree.tree_leaves(results) if isinstance(y, Tensor) and y.is_floating_point()]
        return [y.detach().float() for y in leaves]


def settle(gm: fx.GraphModule, groups: Sequence[Group], judges: dict[Group, Judge], recalls: Recalls | None) -> None:
    """Give groups the alphas that are best for the model, if there are calls to judge by.

    Args:
        groups: All of a graph, each with the alpha and scale that is best for itself.
        judges: Of those that may get another one.
    """
    own = [(g, judges[g]) for g in groups if g in judges and g.alpha is not None]
    if len(own) < 2 or recalls is None or not recalls.calls:
        return
    samples = min(g.sites[0].how.n_samples for g, _ in own)
    whole = Whole(gm, own, [g for g in groups if g not in judges], recalls.calls, samples)
    if not whole.power > 0:
        return
    best = _descend(whole)
    for (group, judge), alpha in zip(own, best, strict=True):
        if alpha == group.alpha:
            continue
        group.alpha, group.error = alpha, judge(alpha)
        group.scale = None if alpha is None else judge.scale(alpha)
        for site in group.sites if alpha is None else ():
            site.done, site.reason = "left", "no alpha makes the error of the model smaller"


def _descend(whole: Whole) -> Alphas:
    hows = [g.sites[0].how for g, _ in whole.groups]
    own: Alphas = tuple(g.alpha for g, _ in whole.groups)
    step = max(how.alpha_step for how in hows)

    def common(alpha: float) -> Alphas:
        """One alpha for all, as far as the configs allow it."""
        return tuple(min(max(round(alpha, 6), how.alpha_min), how.alpha_max) for how in hows)

    whole(own)
    whole((None,) * len(own))
    alpha = round(median_low([a for a in own if a is not None]) / step) * step
    for size in (step, step / 2):
        while (new := min((alpha, alpha - size, alpha + size), key=lambda a: whole(common(a)))) != alpha:
            alpha = new
    for part in (0.5, 0.25, 0.75):
        pairs = zip(own, common(alpha), strict=True)
        whole(tuple(round(part * a + (1 - part) * b, 6) for a, b in pairs))  # type: ignore[operator]
    return min(whole.tried, key=whole.tried.__getitem__)
