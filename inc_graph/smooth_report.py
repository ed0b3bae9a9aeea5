"""What smoothing did to each input of layers: how strong, and who took the scale in. Prints as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from inc_graph.tables import printed

__all__ = ["KEY", "SmoothLine", "Smoothed", "smooth_lines"]

KEY = "smooth"
"""Key of `gm.meta["inc"]` under which the lines of a smoothed graph are."""


@dataclass(frozen=True)
class SmoothLine:
    """One value that layers read.

    Attributes:
        layers: Those that read it scaled, by module path or graph name.
        alpha: Of the scale; None where nothing is scaled.
        by: "absorbed" (constants took the scale in), "multiplied" (by an operator of its own) or "left" (not scaled).
        takers: Who took it in.
        detail: Why it was not absorbed; or what was copied for it.
        largest: The largest scale, relative to the geometric mean of all.
        error: Relative error of the layers' outputs that the search expects; None without a search.
        plain: The same if nothing is scaled.
    """

    layers: tuple[str, ...]
    alpha: float | None
    by: str
    takers: tuple[str, ...] = ()
    detail: str = ""
    largest: float = 1.0
    error: float | None = None
    plain: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Any) -> SmoothLine:
        """Inverse of `to_json`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


class Smoothed(list[SmoothLine]):
    """One line for each value that layers read; prints as a table."""

    def count(self, by: Any) -> int:
        """How many were "absorbed", "multiplied" or "left"."""
        return sum(line.by == by for line in self)

    def __str__(self) -> str:
        return printed(self)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title="smoothing", title_justify="left")
        for name in ("layers", "alpha", "scale", "taken by", "largest", "error", "unscaled"):
            table.add_column(name, justify="right" if name in ("alpha", "largest", "error", "unscaled") else "left")
        for line in self:
            alpha = "-" if line.alpha is None else f"{line.alpha:g}"
            errors = ["-" if e is None else f"{e:.4f}" for e in (line.error, line.plain)]
            takers = ", ".join(line.takers) + (f" ({line.detail})" if line.detail else "")
            table.add_row(", ".join(line.layers), alpha, line.by, takers, f"{line.largest:.1f}", *errors)
        return table


def smooth_lines(gm: fx.GraphModule) -> Smoothed:
    """The lines of a graph; none if it was not smoothed."""
    return Smoothed(SmoothLine.from_json(line) for line in gm.meta.get("inc", {}).get(KEY, []))
