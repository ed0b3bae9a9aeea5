"""Static INT8 of EfficientNet-Lite0 and MiniLM-L6, all contestants in one run: ``python -m benchmarks.static_int8``.

The contestants take turns, many rounds, and each keeps its best time, so that a busy moment of the machine does not
decide. Accuracy: SQNR in dB against the float model (of the logits; of the sentence embeddings and of the hidden states
they are the mean of), correct top-1 of 20 photographs, Spearman correlation with human similarities (float: 17/20 and
0.5045). Calibration data is not evaluation data, and options are chosen on calibration data.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import real_models as rm
from benchmarks.peers import CONTESTANTS, OURS, THREADS, NotApplicable, Run, Task, reason

Inputs = tuple[Tensor, ...]


@dataclass
class Row:
    contestant: str
    ms: dict[str, float] = field(default_factory=dict)  # {"batch 1": milliseconds}
    sqnr_db: dict[str, float] = field(default_factory=dict)  # {"logits": decibel}
    score: str = ""
    note: str = ""


@dataclass(frozen=True)
class Race:
    """A task, the inputs to time by label, the evaluation, the outputs that it gives and the name of its score."""

    task: Task
    timed: dict[str, Inputs]
    evaluate: Callable[[Run], tuple[dict[str, Tensor], str]]  # -> outputs by name, the score as text
    outputs: tuple[str, ...]
    score: str


def efficientnet() -> Race:
    model, images, labels = rm.efficientnet_lite0()

    def evaluate(run: Run) -> tuple[dict[str, Tensor], str]:
        logits = torch.cat([run(image[None]).clone() for image in images])
        return {"logits": logits}, f"{rm.top_k(logits, labels)}/{len(labels)}"

    calibration = [(batch,) for batch in rm.calibration_images().split(4)]
    task = Task("EfficientNet-Lite0", model, calibration, ("image",))
    return Race(task, {"batch 1": (images[:1],), "batch 16": (images[:16],)}, evaluate, ("logits",), "top-1")


def minilm(size: int = 8) -> Race:
    model, tokenizer, documents, human = rm.minilm()
    # One batch size for all: the last batch is filled up with the first documents.
    batches = list(rm.batches(tokenizer, documents + documents[: -len(documents) % size], size))
    mask = torch.cat([mask for _, mask in batches])[: len(documents)]

    def evaluate(run: Run) -> tuple[dict[str, Tensor], str]:
        hidden = torch.cat([run(*batch).clone() for batch in batches])[: len(documents)].float()
        embeddings = rm.mean_pool(hidden, mask)
        outputs = {"embedding": embeddings, "hidden": hidden[mask.bool()]}
        return outputs, f"{rm.lee_scores(embeddings, human)[0]:.4f}"

    calibration = list(rm.batches(tokenizer, rm.calibration_documents(64), size))
    task = Task(
        "MiniLM-L6",
        model,
        calibration,
        ("input_ids", "attention_mask"),
        transformer=True,
        compare=lambda hidden, inputs: rm.mean_pool(hidden, inputs[1]),
    )
    timed = {f"batch {size} x {rm.SEQUENCE}": batches[0]}
    return Race(task, timed, evaluate, ("embedding", "hidden"), "Spearman")


RACES: dict[str, Callable[[], Race]] = {"efficientnet": efficientnet, "minilm": minilm}


@torch.no_grad()
def measure(race: Race, names: list[str], rounds: int, say: Callable[[str], object] = print) -> list[Row]:
    """Build and evaluate every contestant, then time those that work, in turns."""
    reference, score = race.evaluate(race.task.model)
    say(f"{race.task.name}: {race.score} of the float model {score}")
    rows, runs = [], {}
    for name in names:
        row = Row(name)
        start = time.perf_counter()
        try:
            peer = CONTESTANTS[name](race.task)
            outputs, score = race.evaluate(peer.run)
            for inputs in race.timed.values():
                peer.run(*inputs)  # compiles for this shape
            row.sqnr_db = {key: rm.sqnr_db(reference[key], value) for key, value in outputs.items()}
            row.score, row.note = score, peer.note
            runs[name] = peer.run
        except NotApplicable:
            continue
        except Exception as error:  # a contestant's failure is its result
            row.note = f"failed: {reason(error)}"
        rows.append(row)
        say(f"  {name}: ready in {time.perf_counter() - start:.1f} s")
    for label, inputs in race.timed.items():
        best = in_turns({name: partial(run, *inputs) for name, run in runs.items()}, rounds)
        for row in rows:
            if row.contestant in best:
                row.ms[label] = best[row.contestant]
    return rows


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, burst: int = 2) -> dict[str, float]:
    """{name: least milliseconds of a call}; in each round everyone makes one warming call and ``burst`` timed ones."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            for _ in range(burst):
                start = time.perf_counter()
                call()
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def table(race: Race, rows: list[Row]) -> Table:
    shown = Table(
        title=f"{race.task.name}: {THREADS} threads, least ms of interleaved runs, SQNR of the output in dB",
        title_justify="left",
    )
    shown.add_column("contestant", no_wrap=True)
    for label in race.timed:
        shown.add_column(f"{label}\nms", justify="right", no_wrap=True)
        shown.add_column("x\nours", justify="right", no_wrap=True)
    for output in race.outputs:
        shown.add_column(f"{output}\ndB", justify="right", no_wrap=True)
    shown.add_column(race.score, justify="right", no_wrap=True)
    ours = next((row.ms for row in rows if row.contestant == OURS), {})
    for row in rows:
        cells = []
        for label in race.timed:
            ms = row.ms.get(label)
            cells.append("-" if ms is None else f"{ms:.1f}")
            cells.append(f"{ms / ours[label]:.2f}" if ms is not None and label in ours else "-")
        cells += [f"{row.sqnr_db[name]:.1f}" if name in row.sqnr_db else "-" for name in race.outputs]
        style = "bold" if row.contestant.startswith("inc_graph") else None
        shown.add_row(row.contestant, *cells, row.score or "failed", style=style)
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="2 rounds and a short search of options: does it run?")
    parser.add_argument("--model", choices=list(RACES), nargs="*", default=list(RACES))
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="contestants whose name contains one of these")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args(arguments)
    names = [n for n in CONTESTANTS if not options.only or any(text.lower() in n.lower() for text in options.only)]

    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)  # of the other packages
    console = Console()
    console.width = max(console.width, 110)
    results = {}
    for key in options.model:
        race = RACES[key]()
        if options.quick:
            race = replace(race, task=replace(race.task, quick=True))
        rows = measure(race, names, 2 if options.quick else options.rounds, console.log)
        console.print(table(race, rows))
        for row in rows:
            if row.note:
                console.print(f"{row.contestant}: {row.note}", highlight=False, soft_wrap=True)
        results[race.task.name] = [asdict(row) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
