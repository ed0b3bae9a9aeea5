"""Settings by name, layer by layer: an error if one gives no layer its format; none if only some refuse it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from inc_graph.errors import ConfigError
from inc_graph.oppattern import Named
from inc_graph.recipe import Recipe, decide

__all__ = ["Served"]


class Served:
    """What became of the layers that settings by name speak of. For methods of weights alone: of others the layers
    depend on each other, and the report says who stays float."""

    def __init__(self, recipe: Recipe) -> None:
        self._rules = recipe.rules
        self._taken: set[int] = set()
        self._refused: dict[int, tuple[str, str]] = {}

    def taken(self, operators: Sequence[Named]) -> None:
        """A layer is quantized, under these names."""
        self._taken.update(i for op in operators if (i := decide(self._rules, op)) is not None)

    def refused(self, operators: Sequence[Named], reason: str, rules: Iterable[int] | None = None) -> None:
        """A layer cannot be: ConfigError where a setting is its whole name.

        `rules`: indices of those that speak of it; None: the one that it goes by.
        """
        for op in operators:
            found = [decide(self._rules, op)] if rules is None else list(rules)
            for index in found:
                rule = None if index is None else self._rules[index]
                if index is None or rule is None or rule.where.kind != "name" or rule.what is None:
                    continue
                if rule.what.activation is not None or not rule.origin.startswith("set_local("):
                    continue
                if rule.where.fit(op) == "path":
                    raise _error(op.path, reason)
                self._refused.setdefault(index, (op.path, reason))

    def check(self) -> None:
        """ConfigError for a setting that serves none of the layers it speaks of."""
        for index, (path, reason) in self._refused.items():
            if index not in self._taken:
                raise _error(path, reason)


def _error(path: str, reason: str) -> ConfigError:
    hint = "take it out of set_local, or leave it float with dtype='fp32'"
    return ConfigError(f"this layer cannot be quantized: {reason}", module=path, hint=hint)
