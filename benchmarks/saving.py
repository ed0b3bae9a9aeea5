"""Bytes on disk, and seconds to save and to load, of real models: ``python -m benchmarks.saving``.

Beside the folder of this project: the weights of the float model (`torch.save`), the float program and the Q-DQ graph
as `torch.export.save` writes them. Loading ends with a model that can be called; its output is compared with that of
the one that was saved.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import real_models as rm
from inc_graph.quantization import StaticQuantConfig, load, quantize


@dataclass
class Row:
    """One way to keep a model. Bytes, seconds, and the largest difference of outputs (None: not compared)."""

    name: str
    bytes: int
    save: float
    load: float
    difference: float | None = None


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())


def measure(model: nn.Module, calibration: list[tuple[Tensor, ...]], folder: Path) -> list[Row]:
    """The rows of one model; `calibration` are batches of its inputs."""
    inputs = calibration[0]
    rows = []

    def exported(name: str, program: Any) -> None:
        file = folder / f"{name}.pt2"
        _, saving = timed(lambda: torch.export.save(program, str(file)))
        _, loading = timed(lambda: torch.export.load(str(file)).module())
        rows.append(Row(f"{name}, torch.export.save", file.stat().st_size, saving, loading))

    with torch.no_grad():
        buffer = io.BytesIO()
        _, saving = timed(lambda: torch.save(model.state_dict(), buffer))
        _, loading = timed(lambda: torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        rows.append(Row("float weights, torch.save", buffer.tell(), saving, loading))
        exported("float", torch.export.export(model, inputs))
        q = quantize(model, StaticQuantConfig(), lambda p: [p(*x) for x in calibration],
                     inplace=False, example_inputs=inputs)  # fmt: skip
        exported("Q-DQ", torch.export.export(q.graph, inputs))
        _, saving = timed(lambda: q.save(folder / "model"))
        loaded, loading = timed(lambda: load(folder / "model"))
        difference = (loaded(*inputs) - q(*inputs)).abs().max().item()
        rows.append(Row("inc_graph", size(folder / "model"), saving, loading, difference))
    return rows


def efficientnet() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    return rm.efficientnet_lite0()[0], [(x,) for x in rm.calibration_images(8).split(4)]


def minilm() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    model, tokenizer, *_ = rm.minilm()
    return model, list(rm.batches(tokenizer, rm.calibration_documents(16)))


MODELS = {"EfficientNet-Lite0": efficientnet, "MiniLM-L6": minilm}


def table(name: str, rows: list[Row]) -> Table:
    out = Table(title=name, title_justify="left")
    for column in ("", "bytes", "of float", "save s", "load s", "largest difference"):
        out.add_column(column, justify="left" if not column else "right")
    for row in rows:
        share = f"{row.bytes / rows[0].bytes:.3f}"
        diff = "" if row.difference is None else f"{row.difference:.1e}"
        out.add_row(row.name, f"{row.bytes:,}", share, f"{row.save:.2f}", f"{row.load:.2f}", diff)
    return out


def main() -> None:
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            Console().print(table(name, measure(*make(), Path(folder))))


if __name__ == "__main__":
    main()
