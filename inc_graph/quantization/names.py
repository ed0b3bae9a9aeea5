"""Names in `set_local` and `white_list` are regular expressions matched at the start: say so where that surprises."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from inc_graph.errors import IncWarning
from inc_graph.recipe import Recipe

__all__ = ["warn_prefixes"]

_PLAIN = re.compile(r"[\w.-]+")


def warn_prefixes(recipe: Recipe, paths: Iterable[str], stacklevel: int = 2) -> None:
    """Warn, by name, where a rule for module `fc1` also takes `fc10`, which its author may not have meant.

    Only names that read as a plain module path of the model are looked at: whoever writes `fc.*`, or `fc` where no
    module is called so, wants the prefix.
    """
    known = {".".join(parts[:i]) for p in paths for parts in [p.split(".")] for i in range(1, len(parts) + 1)}
    for rule in recipe.rules:
        name = rule.where.value
        if rule.where.kind != "name" or name not in known or not _PLAIN.fullmatch(name):
            continue
        depth = name.count(".") + 1
        hit = {".".join(p.split(".")[:depth]) for p in known if re.match(name, p)} - {name}
        if hit:
            others = sorted(hit)
            shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
            text = f"{rule.origin or rule.where} also takes {shown}: names are matched at their start"
            warnings.warn(f"{text}; write {re.escape(name)}(\\.|$) for {name} alone", IncWarning, stacklevel=stacklevel)
