"""What `autotune` found, as tables: all trials, the Pareto front, the damage by layer; live while it searches."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.sensitivity_search import Sensitivity

__all__ = ["Trial", "TuningResult", "watch"]


@dataclass(frozen=True)
class Trial:
    """One config that was tried.

    Attributes:
        index: From 0, in the order they were tried.
        config: What was tried.
        score: What `eval_fn` gave, None if the model could not be quantized so.
        accepted: Whether the score is within the tolerance.
        bytes: Of the weights and buffers of the result.
        milliseconds: One call on the example inputs, None without example inputs.
        seconds: To calibrate, convert and evaluate.
        error: Why the model could not be quantized so.
        floats, finer: By the strategy "sensitivity": layers that it left float, and that it gave another config of the
            set than the first one.
    """

    index: int
    config: BaseConfig
    score: float | None = None
    accepted: bool = False
    bytes: int = 0
    milliseconds: float | None = None
    seconds: float = 0.0
    error: str = ""
    floats: tuple[str, ...] = ()
    finer: tuple[str, ...] = ()

    def describe(self) -> str:
        """The config, or in short how it differs from the first one."""
        parts = [f"{len(self.finer)} in another config: {_few(self.finer)}"] if self.finer else []
        parts += [f"{len(self.floats)} float: {_few(self.floats)}"] if self.floats else []
        return "; ".join(parts) or str(self.config)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


@dataclass
class TuningResult:
    """What `autotune` found: the attribute `tuning` of the model it returns. Prints as tables.

    Attributes:
        baseline: Score of the float model.
        limit: The worst score that is within the tolerance.
        higher_is_better: Whether a larger score is better.
        trials: All of them, in the order they were tried.
        best: The one that the returned model comes from.
        reason: Why the search stopped.
        sensitivity: By the strategy "sensitivity": the damage of each layer, the most harmful first.
    """

    baseline: float
    limit: float
    higher_is_better: bool
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    reason: str = ""
    sensitivity: Sensitivity | None = None

    def pareto(self) -> list[Trial]:
        """The trials that no other one beats in score, bytes and time at once, the smallest first."""
        done = [t for t in self.trials if t.score is not None and t.score == t.score]
        front = [t for t in done if not any(_dominates(o, t, self.higher_is_better) for o in done)]
        return sorted(front, key=lambda t: t.bytes)

    def __rich__(self) -> Any:
        from rich.console import Group

        tables = [_trials(self, self.trials, f"tuning: {self.reason}")]
        if len(self.trials) > 1 and (front := self.pareto()):
            tables.append(_pareto(self, front))
        return Group(*tables, *([] if self.sensitivity is None else [self.sensitivity]))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=140, force_terminal=False)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    def loss(self, score: float) -> float:
        """How much worse than the float model; below 0 for what is better, 0 for an equal one, also an infinite one."""
        if score == self.baseline:
            return 0.0
        return self.baseline - score if self.higher_is_better else score - self.baseline

    @property
    def sign(self) -> str:
        """How a score within the tolerance compares with `limit`."""
        return ">=" if self.higher_is_better else "<="


def _dominates(a: Trial, b: Trial, higher_is_better: bool) -> bool:
    def costs(t: Trial) -> tuple[float, ...]:
        score = float(t.score or 0)
        return (-score if higher_is_better else score, t.bytes, t.milliseconds or 0.0)

    return a is not b and costs(a) != costs(b) and all(x <= y for x, y in zip(costs(a), costs(b), strict=True))


def _trials(result: TuningResult, trials: Sequence[Trial], title: str, running: str = "") -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for name in ("trial", "score", "bytes", "ms", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("config", overflow="fold")
    table.add_column("")
    limit = f"within tolerance: {result.sign} {result.limit:.6g}"
    table.add_row("float", f"{result.baseline:.6g}", "", "", "", "", limit)
    for t in trials:
        notes = ["best"] * (t is result.best) + ["accepted"] * t.accepted
        config, last = Text(t.describe()), Text(t.error or ", ".join(notes))  # as they are: brackets are no markup
        table.add_row(*_figures(t), f"{t.seconds:.1f}", config, last)
    if running:
        table.add_row("...", "", "", "", "", Text(running), "running")
    return table


def _pareto(result: TuningResult, front: Sequence[Trial]) -> Any:
    from rich.table import Table

    table = Table(title="Pareto front: no other trial is better", title_justify="left")
    for name in ("trial", "score", "bytes", "ms"):
        table.add_column(name, justify="right")
    table.add_column("")
    for t in front:
        table.add_row(*_figures(t), "best" * (t is result.best))
    return table


def _figures(t: Trial) -> tuple[str, str, str, str]:
    score = "-" if t.score is None else f"{t.score:.6g}"
    ms = "-" if t.milliseconds is None else f"{t.milliseconds:.2f}"
    return str(t.index), score, f"{t.bytes:,}" if t.bytes else "-", ms


# ---------------------------------------------------------------------------------------------------------------- live
@contextlib.contextmanager
def watch(result: TuningResult, show: bool | None = None) -> Iterator[Callable[[str], None]]:
    """Within the block the table of trials is on the screen, and at its end the result; `step(text)` says what runs.

    Args:
        result: Read again at each refresh.
        show: None: only if stderr is a terminal, as for progress bars.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda text: None
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stderr)
    running = "..."

    def table() -> Any:
        rows = max(console.height - 10, 3)  # what is too high for the screen would lose its end
        hidden = len(result.trials) - rows
        title = "tuning" if hidden <= 0 else f"tuning, {hidden} earlier trials not shown"
        return _trials(result, list(result.trials)[-rows:], title, running)

    stdout = sys.stdout.isatty()  # what is printed into a file or a pipe goes there
    live = Live(get_renderable=table, console=console, transient=True, redirect_stdout=stdout, redirect_stderr=False)

    def step(text: str) -> None:
        nonlocal running
        running = text
        live.refresh()

    try:
        with live, _Above(console) as above, contextlib.redirect_stderr(above):
            yield step
    except BaseException:
        if result.trials:
            console.print(_trials(result, result.trials, "tuning: broken off"))
        raise
    console.print(result)


class _Above(io.TextIOBase):
    """stderr while a live table is on it: whole lines go above the table. It is no terminal, so nobody else draws."""

    def __init__(self, console: Any) -> None:
        self._console, self._line = console, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def close(self) -> None:
        if self._line:
            self.write("\n")
        super().close()
