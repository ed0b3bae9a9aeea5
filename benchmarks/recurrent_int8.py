"""LSTM and GRU in dynamic INT8 beside torch's own, in one run: ``python -m benchmarks.recurrent_int8``.

A layer of random weights, 50 steps: milliseconds of a call (contestants in turns, median), SQNR of all outputs against
the float layer's. `quantize_dynamic` of torch rounds the state to 8 bits at each step, with one range for all
sequences; ours keeps it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.peers import THREADS

STEPS = 50


def contestants(layer: nn.Module) -> dict[str, nn.Module]:
    from inc_graph.quantization import DynamicQuantConfig, quantize

    config = DynamicQuantConfig(act_granularity="per_token", w_granularity="per_channel")
    model = nn.Sequential(layer).eval()
    return {
        "torch float32": model,
        "torch.ao dynamic": torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {type(layer)}),
        "inc_graph dynamic": quantize(copy.deepcopy(model), config),
    }


def sqnr(have: Tensor, want: Tensor) -> float:
    """In dB."""
    return float(20 * torch.log10(want.norm() / (have - want).norm()))


def race(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of a call, in turns, after three of each."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for i, (name, model) in itertools.product(range(rounds + 3), models.items()):
        start = time.perf_counter()
        model(x)
        if i >= 3:
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(rounds: int, console: Console) -> list[dict[str, Any]]:
    table = Table(f"{STEPS} steps", *contestants(nn.LSTM(8, 8).eval()), title_justify="left")
    found = []
    for kind, size, batch in itertools.product((nn.LSTM, nn.GRU), (256, 512), (1, 8)):
        torch.manual_seed(0)
        layer, x = kind(size, size).eval(), torch.randn(STEPS, batch, size)
        models = contestants(layer)
        times, want = race(models, x, rounds), layer(x)[0]
        quality = {name: sqnr(model(x)[0], want) for name, model in models.items() if model[0] is not layer}  # type: ignore[index]
        row = f"{kind.__name__} {size}, batch {batch}"
        table.add_row(
            row, *(f"{t:.2f} ms" + (f", {quality[n]:.1f} dB" if n in quality else "") for n, t in times.items())
        )
        found.append({"layer": row, "ms": times, "dB": quality})
    console.print(table)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    console = Console()
    console.width = max(console.width, 110)
    with torch.no_grad():
        found = measure(options.rounds, console)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
