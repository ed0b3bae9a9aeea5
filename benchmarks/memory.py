"""Peak resident memory of quantizing SmolLM2, beside that of importing torch and transformers.

``python -m benchmarks.memory``. Each line is a process of its own, and its figure the most memory that it has had
resident above what one has that only imports torch and transformers. "in memory" begins with the float32 model, whose
weights are pages of its file until they are read; "streamed" makes a model without weights and reads them from the
checkpoint folder, a block or a layer at a time. That the result is as good is shown by its perplexity, which is taken
after the peak was read. (RTN and HQQ give the same integers either way. GPTQ in memory calibrates the layers of a block
on what the rounded ones before them in that block give, and streamed on what the rounded blocks before give.)

Each line is said when it is there; all of them take about five minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.fresh_process import Failed, answer, measure, peak_bytes
from benchmarks.peers import THREADS

GPTQ = {"bits": 4, "group_size": 64, "use_sym": False}
HQQ = {"bits": 4, "group_size": 64}
RTN = {"bits": 4, "group_size": 32}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (config, options); what streams knows the folder
    "RTN in memory": ("RTNConfig", {**RTN, "use_layer_wise": False}),
    "RTN streamed": ("RTNConfig", {**RTN, "use_layer_wise": True}),
    "HQQ in memory": ("HQQConfig", HQQ),
    "HQQ streamed": ("HQQConfig", HQQ),
    "GPTQ in memory": ("GPTQConfig", GPTQ),
    "GPTQ streamed": ("GPTQConfig", {**GPTQ, "use_block_wise": True}),
}
IMPORTS = "imports only"


@dataclass
class Row:
    """Peak bytes of the process, seconds of quantizing, perplexity of the result."""

    way: str
    peak: int = 0
    seconds: float | None = None
    perplexity: float | None = None
    note: str = ""


def peak(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the fields of a `Row` for one of the ways."""
    from transformers import LlamaForCausalLM

    way, folder = task["way"], Path(task["folder"])
    if way == IMPORTS:
        return {"peak": peak_bytes()}
    checkpoint, data = folder / "model", load_file(folder / "data.safetensors")
    model = None
    if "streamed" not in way:
        model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    start = time.perf_counter()
    model = _quantized(way, model, checkpoint, data["calibration"])
    seconds = time.perf_counter() - start
    found = peak_bytes()
    from benchmarks.language_model import perplexity

    return {"peak": found, "seconds": seconds, "perplexity": perplexity(model, data["windows"])}


def _quantized(way: str, model: Any, checkpoint: Path, calibration: torch.Tensor) -> Any:
    import inc_graph.quantization as q

    name, options = WAYS[way]
    if model is None:
        from inc_graph.utils import load_empty_model

        model = load_empty_model(checkpoint)  # which remembers the folder
    prepared = q.prepare(model, getattr(q, name)(**options))
    for window in calibration if name == "GPTQConfig" else ():
        prepared(input_ids=window[None], use_cache=False)
    return q.convert(prepared)


def race(ways: list[str], quick: bool, say: Callable[[str], object]) -> list[Row]:
    """The row of the imports, and one for each way."""
    from benchmarks import language_model as lm

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = lm.smollm2()
        with lm.quiet():
            model.save_pretrained(Path(folder) / "model")
        windows, calibration = lm.wiki_windows(tokenizer), lm.calibration_windows(tokenizer)
        if quick:
            windows, calibration = windows[:1, :128], calibration[:4, :128]
        data = {"windows": windows.contiguous(), "calibration": calibration.contiguous()}
        save_file(data, Path(folder) / "data.safetensors")
        del model
        for way in (IMPORTS, *ways):
            try:
                row = Row(way, **measure("benchmarks.memory", {"way": way, "folder": folder}, THREADS))
            except Failed as error:
                row = Row(way, note=f"failed: {error}")
            rows.append(row)
            say(f"{way}: {row.note or ', '.join(filter(None, _cells(row, rows[0].peak)))}")
    return rows


def _cells(row: Row, imports: int) -> list[str]:
    timed = "" if row.seconds is None else f"{row.seconds:.1f} s"
    judged = "" if row.perplexity is None else f"{row.perplexity:.3f}"
    return [f"{row.peak / 1e6:.0f} MB", f"{(row.peak - imports) / 1e6:.0f} MB above the imports", timed, judged]


def table(rows: list[Row]) -> Table:
    shown = Table(title=f"SmolLM2-135M, folded: 651 MB in float32; {THREADS} threads", title_justify="left")
    shown.add_column("way")
    for name in ("peak", "above the imports", "time", "perplexity"):
        shown.add_column(name, justify="right")
    for row in rows:
        if row.note:
            shown.add_row(row.way, row.note)
            continue
        peak, above, *rest = _cells(row, rows[0].peak)
        shown.add_row(row.way, peak, above.removesuffix(" above the imports"), *rest)
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="ways whose name contains this")
    parser.add_argument("--quick", action="store_true", help="little text: does it run?")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    console = Console()
    ways = [way for way in WAYS if options.only.lower() in way.lower()]
    rows = race(ways, options.quick, console.log)
    console.print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if not answer(peak):
        main()
