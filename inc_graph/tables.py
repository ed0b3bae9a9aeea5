"""Tables as plain text."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["printed"]


def printed(table: Any) -> str:
    """Whatever rich can print, as plain text 120 columns wide."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
