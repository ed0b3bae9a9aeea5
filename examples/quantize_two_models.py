"""Two trained models to static INT8, and what was gained: `make demo`, or `python -m examples.quantize_two_models`.

EfficientNet-Lite0 is judged on 20 labelled photographs, MiniLM-L6 on 50 documents whose similarity people have rated.
The calibration data is other data: other crops of the photographs, and other documents. Weights and data come from the
packages of the extra `[eval]`; nothing is downloaded.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import real_models as rm
from inc_graph.calibrate import run_calibration
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.report import OpLine, Report
from inc_graph.utils import progress

THREADS = 2
ROUNDS, ENOUGH_S = 8, 5.0  # rounds of timing, and the seconds after which three rounds are enough
Inputs = tuple[Tensor, ...]
Run = Callable[..., Tensor]

BATCH = torch.export.Dim("batch", min=1, max=256)
LENGTH = torch.export.Dim("length", min=2, max=512)


@dataclass
class Case:
    """A float model, the data to calibrate it on, and how it is judged."""

    name: str
    model: nn.Module
    calibration: list[Inputs]
    dynamic_shapes: tuple[dict, ...]
    outputs: Callable[[Run], Tensor]  # of the evaluation data
    score: Callable[[Tensor], str]
    judged_by: str
    compared: str  # which output the SQNR is of
    timed: dict[str, Inputs]


@dataclass
class Outcome:
    """What the table shows of one model."""

    case: Case
    report: Report
    scores: tuple[str, str]
    sqnr_db: float
    calls: int
    seconds: float
    ms: dict[str, tuple[float, float]] = field(default_factory=dict)


def efficientnet() -> Case:
    model, images, labels = rm.efficientnet_lite0()
    return Case(
        name="EfficientNet-Lite0",
        model=model,
        calibration=[(batch,) for batch in rm.calibration_images().split(4)],
        dynamic_shapes=({0: BATCH},),
        outputs=lambda run: torch.cat([run(batch) for batch in images.split(4)]),
        score=lambda logits: f"{rm.top_k(logits, labels)}/{len(labels)}",
        judged_by="top-1",
        compared="logits",
        timed={"1 image": (images[:1],), "16 images": (images[:16],)},
    )


def minilm() -> Case:
    model, tokenizer, documents, human = rm.minilm()
    calibration = list(rm.batches(tokenizer, rm.calibration_documents(64)))
    return Case(
        name="MiniLM-L6",
        model=model,
        calibration=calibration,
        dynamic_shapes=({0: BATCH, 1: LENGTH},) * 2,
        outputs=lambda run: rm.embed(run, tokenizer, documents),
        score=lambda embeddings: f"{rm.lee_scores(embeddings, human)[0]:.4f}",
        judged_by="Spearman",
        compared="mean-pooled embeddings",
        timed={f"8 x {rm.SEQUENCE} tokens": next(iter(rm.batches(tokenizer, documents, 8)))},
    )


def quantize(case: Case) -> tuple[nn.Module, float]:
    """The int8 model, and the seconds it took without the calibration runs."""
    start = time.perf_counter()
    with progress(f"{case.name}: export"):
        exported = export(case.model, case.calibration[0], dynamic_shapes=case.dynamic_shapes)
    prepared = prepare(exported, StaticQuantConfig())
    seconds = time.perf_counter() - start
    run_calibration(prepared, case.calibration)  # the same as: for batch in calibration: prepared(*batch)
    start = time.perf_counter()
    model = convert(prepared)
    return model, seconds + time.perf_counter() - start


@torch.no_grad()
def run(case: Case) -> Outcome:
    with progress(f"{case.name}: float reference"):
        reference = case.outputs(case.model)
    model, seconds = quantize(case)
    with progress(f"{case.name}: evaluation and timing"):
        result = case.outputs(model)
        outcome = Outcome(
            case=case,
            report=model.report,
            scores=(case.score(reference), case.score(result)),
            sqnr_db=rm.sqnr_db(reference, result),
            calls=kernel_calls(model, next(iter(case.timed.values()))),
            seconds=seconds,
        )
        for label, inputs in case.timed.items():
            outcome.ms[label] = in_turns([case.model, model], inputs)
    return outcome


def kernel_calls(model: nn.Module, inputs: Inputs) -> int:
    """How many int8 kernels of oneDNN one call of the model runs, as torch's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(*inputs)
    names = ("onednn::qconv", "onednn::qlinear")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(names))


def in_turns(models: Iterable[Run], inputs: Inputs) -> tuple[float, ...]:
    """Least milliseconds of each model; they take turns, so that a busy moment of the machine hits all."""
    models = list(models)
    best = [float("inf")] * len(models)
    begin = time.perf_counter()
    for done in range(ROUNDS):
        if done >= 3 and time.perf_counter() - begin > ENOUGH_S:
            break
        for i, model in enumerate(models):
            model(*inputs)  # brings its weights back into the cache
            start = time.perf_counter()
            model(*inputs)
            best[i] = min(best[i], (time.perf_counter() - start) * 1e3)
    return tuple(best)


def by_type(lines: list[OpLine]) -> str:
    counts = Counter(line.op for line in lines)
    return f"{len(lines)}: " + ", ".join(f"{n} {op}" for op, n in counts.most_common()) if lines else "none"


def table(outcomes: list[Outcome]) -> Table:
    shown = Table(
        title=f"static INT8 with default options, {THREADS} threads, torch {torch.__version__}",
        title_justify="left",
        show_lines=False,
    )
    shown.add_column("", no_wrap=True)
    for o in outcomes:
        shown.add_column(o.case.name)

    def row(label: str, cell: Callable[[Outcome], str]) -> None:
        shown.add_row(label, *(cell(o) for o in outcomes))

    row("accuracy, float -> int8", lambda o: f"{o.case.judged_by} {o.scores[0]} -> {o.scores[1]}")
    row("SQNR of the output", lambda o: f"{o.sqnr_db:.1f} dB ({o.case.compared})")
    row("bytes of weights", lambda o: _bytes(o.report))
    row(
        "ms, torch eager -> int8",
        lambda o: "\n".join(f"{k}: {a:.1f} -> {b:.1f} ({a / b:.1f} x as fast)" for k, (a, b) in o.ms.items()),
    )
    row("operators quantized", lambda o: by_type(o.report.quantized))
    row("run in int8 kernels", lambda o: by_type(o.report.kernels))
    row("int8 kernels in one run", lambda o: f"{o.calls} calls counted by torch.profiler")
    row("export, prepare, convert", lambda o: f"{o.seconds:.1f} s, without the calibration runs")
    shown.add_section()
    row("stayed float, and why", lambda o: "\n".join(_why(o.report)) or "nothing")
    return shown


def _bytes(report: Report) -> str:
    before, after = report.bytes_before, report.bytes_after
    return f"{before:,} -> {after:,} ({after / before:.3f} x)"


def _why(report: Report) -> list[str]:
    floats = Counter((line.op, line.detail) for line in report.floats)
    slow = Counter((line.op, f"quantized, but without a kernel: {line.detail}") for line in report.reference)
    return [f"{count} {op}: {reason}" for (op, reason), count in (floats + slow).items()]


def main() -> None:
    warnings.filterwarnings("ignore", module="copyreg")  # torch.export deprecates a class of its own
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself
    torch.set_num_threads(THREADS)
    outcomes = []
    for make in (efficientnet, minilm):
        with progress(f"loading {make.__name__}"):
            case = make()
        outcomes.append(run(case))
    console = Console()
    console.width = console.width if console.is_terminal else 120
    console.print(table(outcomes))


if __name__ == "__main__":
    main()
