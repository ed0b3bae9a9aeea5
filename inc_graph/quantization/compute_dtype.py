"""What weight-only layers compute in, as users say it: one dtype, or one for each pattern of layer names.

It is a choice of the lowering, and machines differ: so it is no part of the Q-DQ graph's text and is not saved. It
rides in the `meta` of the graphs that are lowered, where a backend asks it of each of its weight-only layers; so it
holds when a converted model moves and is lowered anew.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from inc_graph.errors import ConfigError, IncWarning, UnusedRuleWarning
from inc_graph.oppattern import Named, named, pattern_of
from inc_graph.quantization.layers import leaves, report_of
from inc_graph.quantization.names import warn_prefixes
from inc_graph.quantization.where import is_predicate, shown, where_of
from inc_graph.recipe import FITS, Recipe, WhereRule

__all__ = ["ComputeDtype", "ComputeDtypes", "chosen"]

ComputeDtype = torch.dtype | str | None | Mapping[Any, torch.dtype | str | None]
"""A dtype, its name, "auto" or None; or such for each name, regular expression or class that `set_local` takes."""

KEY = "compute_dtype"  # of the graph's meta; `lowering._weight_only_claims` reads it
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True)
class ComputeDtypes:
    """What an argument `compute_dtype` says. A backend calls it with each weight-only layer that it makes.

    Attributes:
        rules: In the order they were said; no rules: nothing was said.
        dtypes: Of each rule; None: "auto".
        names: What the layer of this graph is called in the model, where the graph is that layer.
        matched, asked: Filled by those calls: indices of rules that speak of a layer, names of layers.
    """

    rules: tuple[WhereRule, ...] = ()
    dtypes: tuple[torch.dtype | None, ...] = ()
    names: tuple[str, ...] = ()
    matched: set[int] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, value: Any) -> ComputeDtypes:
        """Read the argument.

        Raises:
            ConfigError: an entry is no dtype, or its key no name and no class.
        """
        if not isinstance(value, Mapping):
            dtype = _read(value, "compute_dtype")
            return cls() if dtype is None else cls((WhereRule(),), (dtype,))
        rules, dtypes = [], []
        for key, entry in value.items():
            if is_predicate(key):
                raise ConfigError("compute_dtype takes no predicates", hint="name the layers, or give their class")
            rules.append(WhereRule(where_of(key), None, f"compute_dtype[{shown(key)}]"))
            dtypes.append(_read(entry, rules[-1].origin))
        return cls(tuple(rules), tuple(dtypes))

    def __call__(self, node: fx.Node) -> torch.dtype | None:
        """The dtype for a layer; None if nothing, or "auto", is said of it. The better fit counts, then the later."""
        pattern = pattern_of(node)
        if pattern is None:
            return None
        op = named(node, pattern)
        known = [replace(op, path=name, name=name) for name in self.names] or [op]
        self.asked.add(known[0].name)
        fits = [(FITS.index(fit), i) for i, rule in enumerate(self.rules) if (fit := _fit(rule, known)) is not None]
        self.matched.update(i for _, i in fits)
        return self.dtypes[max(fits)[1]] if fits else None

    def put(self, gm: fx.GraphModule, names: tuple[str, ...] = ()) -> None:
        """Let the lowering of this graph see it."""
        if self.rules:
            gm.meta[KEY] = replace(self, names=names)  # what is filled is shared

    def tell(self, made: nn.Module, stacklevel: int = 3) -> None:
        """After lowering: warn of what was said in vain."""
        if self.rules and not self.asked:
            backend = getattr(report_of(made) or getattr(made, "report", None), "backend", "")
            where = f"on backend '{backend}' " if backend else ""
            text = f"compute_dtype is not used: {where}no kernel runs a weight-only layer of this model"
            warnings.warn(text, IncWarning, stacklevel=stacklevel)
            return
        for i, rule in enumerate(self.rules):
            if i not in self.matched:
                text = f"{rule.origin} matched no weight-only layer of the model"
                warnings.warn(text, UnusedRuleWarning, stacklevel=stacklevel)
        warn_prefixes(Recipe("compute_dtype", self.rules, "", ""), self.asked, stacklevel + 1)


def _fit(rule: WhereRule, known: list[Named]) -> str | None:
    """The best way in which a rule speaks of a layer that has these names."""
    return max((fit for op in known if (fit := rule.where.fit(op)) is not None), key=FITS.index, default=None)


def _read(value: Any, where: str) -> torch.dtype | None:
    if value is None or value == "auto":
        return None
    dtype = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES.values():
        raise ConfigError(f"{where} cannot be {value!r}", hint=f"one of {', '.join(_DTYPES)} and 'auto'")
    return dtype


@contextlib.contextmanager
def chosen(model: nn.Module, compute_dtype: Any) -> Iterator[ComputeDtypes]:
    """Let the conversion of a prepared model see the argument; the prepared model is left as it was.

    Raises:
        ConfigError: as `ComputeDtypes.of`.
    """
    choice = ComputeDtypes.of(compute_dtype)
    graphs: list[tuple[fx.GraphModule, tuple[str, ...]]] = [(model, ())] if isinstance(model, fx.GraphModule) else []
    graphs += [(leaf.inner, tuple(p)) for leaf, p in leaves(model).items() if isinstance(leaf.inner, fx.GraphModule)]
    for graph, names in graphs:
        choice.put(graph, names)
    try:
        yield choice
    finally:
        for graph, _ in graphs:
            graph.meta.pop(KEY, None)
