"""The IPEX backend beside the inductor backend and float32, in one process: ``make test-ipex``, then
``.venv-ipex/bin/python -m benchmarks.ipex``.

An MLP 1024-4096-1024 at 128 rows, MiniLM-L6 and EfficientNet-Lite0, calibrated on data that is not evaluated. All take
turns and keep their best time. SQNR in dB against the float model, and against the eager reference of the same Q-DQ
graph; groups are int8 fusion groups in the graph that IPEX has executed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import real_models as rm
from benchmarks.static_int8 import in_turns
from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A model, calibration and evaluation batches, and the batches to time by label."""

    name: str
    model: nn.Module
    calibration: list[Batch]
    evaluation: list[Batch]
    timed: dict[str, Batch]


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024)).eval()
    x = [(torch.randn(128, 1024),) for _ in range(6)]
    return Case("MLP 1024-4096-1024", model, x[:4], x[4:], {"128 rows": x[4]})


def minilm() -> Case:
    model, tokenizer, documents, _ = rm.minilm()
    evaluation = list(rm.batches(tokenizer, documents[:48], 8))
    one: Batch = tuple(t[:1] for t in evaluation[0])
    calibration = list(rm.batches(tokenizer, rm.calibration_documents(64), 8))
    return Case("MiniLM-L6", model, calibration, evaluation, {"8 x 128": evaluation[0], "1 x 128": one})


def efficientnet() -> Case:
    model, images, _ = rm.efficientnet_lite0()
    calibration = [(batch,) for batch in rm.calibration_images().split(4)]
    timed: dict[str, Batch] = {"batch 1": (images[:1],), "batch 16": (images[:16],)}
    return Case("EfficientNet-Lite0", model, calibration, [(images,)], timed)


CASES = {"mlp": mlp, "minilm": minilm, "efficientnet": efficientnet}


def outputs(model: Any, batches: list[Batch]) -> Tensor:
    return torch.cat([model(*batch) for batch in batches])


def groups(model: Any) -> int:
    """int8 groups that IPEX made of the model."""
    return sum(getattr(v, "groups", 0) for v in vars(model.lowered).values())


@torch.no_grad()
def measure(case: Case, rounds: int) -> Iterator[list[str]]:
    """A row for each contestant, the float model first."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    dynamic = tuple({0: batch} for _ in case.calibration[0])
    prepared = prepare(export(case.model, case.calibration[0], dynamic_shapes=(dynamic)), StaticQuantConfig())
    for inputs in case.calibration:
        prepared(*inputs)
    models = {name: convert(prepared, backend=name) for name in ("ipex", "inductor", "eager")}
    exact, truth = outputs(models["eager"], case.evaluation), outputs(case.model, case.evaluation)
    runs: dict[str, Any] = {"float32": case.model, "ipex": models["ipex"], "inductor": models["inductor"]}
    best = {
        label: in_turns({name: lambda m=m, x=x: m(*x) for name, m in runs.items()}, rounds)  # type: ignore[misc]
        for label, x in case.timed.items()
    }
    for name, model in {**runs, "eager": models["eager"]}.items():
        row = [f"{case.name}: {name}"]
        for label in case.timed:
            row.append(f"{label} {best[label][name]:.2f}" if name in best[label] else "-")
            row.append(f"{best[label][name] / best[label]['float32']:.3f}" if name in best[label] else "-")
        row += ["-"] * (5 - len(row))
        if name == "float32":
            yield [*row, "-", "-", "-"]
            continue
        got = exact if name == "eager" else outputs(model, case.evaluation)
        kept = f"{len(model.report.kernels)} / {len(model.report.reference)}"
        row += [f"{rm.sqnr_db(truth, got):.2f}", "-" if name == "eager" else f"{rm.sqnr_db(exact, got):.1f}"]
        yield [*row, kept + (f", {groups(model)} groups" if name == "ipex" else "")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=list(CASES), nargs="*", default=list(CASES))
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    import intel_extension_for_pytorch as ipex

    console = Console()
    console.width = max(console.width, 150)
    console.print(f"torch {torch.__version__}, IPEX {ipex.__version__}, {options.threads} threads")
    for name in options.model:
        table = Table()
        for column in ("model", "ms", "x float", "ms", "x float", "SQNR dB", "to eager", "kernels / reference"):
            table.add_column(column)
        for row in measure(CASES[name](), options.rounds):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
