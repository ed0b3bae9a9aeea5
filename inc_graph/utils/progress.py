"""Progress of long work, with the time that it took and (where the number of steps is known) is left. On a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["progress"]


@contextlib.contextmanager
def progress(what: str, total: int | None = None, show: bool | None = None) -> Iterator[Callable[[str], None]]:
    """Within the block, `step(text)` starts the next step, which the bar names.

    Args:
        what: What is being done.
        total: Number of steps, None if it is not known.
        show: None: only if stderr is a terminal. Nothing stays on the screen.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total is not None:
        columns += [TextColumn("{task.completed}/{task.total}, left"), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        started = 0

        def step(text: str) -> None:
            nonlocal started
            bar.update(task, description=f"{what}: {text}", completed=started)
            started += 1

        yield step
