"""What a command gives back, and how it is printed."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAILED", "OK", "USAGE", "Result", "UsageError", "error_data", "pairs", "size", "table"]

OK, FAILED, USAGE = 0, 1, 2


class UsageError(Exception):
    """The command line cannot be meant: exit code 2."""


@dataclass
class Result:
    """What a command says.

    Attributes:
        data: For `--json`.
        text: For people.
        code: `OK`, or `FAILED` if what was looked at is not in order.
    """

    data: dict[str, Any]
    text: str = ""
    code: int = OK
    notes: list[str] = field(default_factory=list)

    def show(self, as_json: bool) -> None:
        """Print it; notes go to stderr."""
        for note in self.notes:
            print(note, file=sys.stderr)
        print(json.dumps(_plain(self.data), indent=2, allow_nan=False) if as_json else self.text)


def error_data(error: BaseException) -> dict[str, Any]:
    """An error for `--json`."""
    facts = {name: getattr(error, name, None) for name in ("node", "module", "hint")}
    message = getattr(error, "message", None) or str(error)
    return {"error": {"type": type(error).__name__, "message": message, **facts}}


def _plain(data: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {str(k): _plain(v) for k, v in data.items()}
    return [_plain(v) for v in data] if isinstance(data, list | tuple) else data


def size(count: int | None) -> str:
    """Bytes for people: "3.1 MB"."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def pairs(rows: Iterable[tuple[str, Any]], indent: str = "") -> str:
    """Lines of a name and what it is, the latter aligned; several lines of it under each other."""
    kept = [(name, str(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in kept), default=0) + 2
    gap = "\n" + " " * (len(indent) + width)
    return "\n".join(f"{indent}{name:{width}}{gap.join(value.splitlines())}".rstrip() for name, value in kept)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as text. On a terminal it is as wide as that; elsewhere as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    width = None if sys.__stdout__ is not None and sys.__stdout__.isatty() else 400
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(made)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
