"""Products of two activations on the CPU, by kernel: ``python -m benchmarks.activation_products``.

Milliseconds, contestants in turns, median. "oneDNN int8" and "torch._int_mm" have their codes given, the former in the
second column its packed operand as well; "int8, all in all" finds ranges, makes codes and multiplies (inc_graph,
dynamic per tensor, no batches).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.peers import THREADS
from inc_graph.lowering import _dynamic_product
from inc_graph.lowering._dynamic import dynamic_codes

SHAPES = (
    (96, 128, 64, 128), (96, 128, 128, 64), (12, 512, 64, 512), (12, 512, 512, 64),
    (1, 256, 256, 256), (1, 512, 512, 512), (1, 1024, 1024, 1024), (1, 4096, 4096, 4096),
)  # fmt: skip
FORMAT = ("uint8", "asymmetric", False)


def contestants(batch: int, m: int, k: int, n: int) -> dict[str, Callable[[], Any]]:
    a, b = torch.randn(batch, m, k), torch.randn(batch, k, n)
    x, y = a.bfloat16(), b.bfloat16()
    codes = torch.randint(0, 256, (batch, m, k), dtype=torch.uint8)
    signed = torch.randint(-127, 128, (batch, m, k), dtype=torch.int8)
    weight = torch.randint(-127, 128, (batch, k, n), dtype=torch.int8)
    ones, zeros, onednn = torch.ones(n), torch.zeros(n, dtype=torch.int32), torch.ops.onednn
    head = ("none", [], "")

    def pack(i: int) -> Tensor:
        found: Tensor = onednn.qlinear_prepack(weight[i].t().contiguous(), [m, k])
        return found

    def multiply(i: int, packed: Tensor) -> None:
        onednn.qlinear_pointwise(codes[i], 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, *head)

    given = [pack(i) for i in range(batch)]
    found: dict[str, Callable[[], Any]] = {
        "float32": lambda: torch.matmul(a, b),
        "bfloat16": lambda: torch.matmul(x, y),
        "bfloat16, casts": lambda: torch.matmul(a.bfloat16(), b.bfloat16()).float(),
        "codes of both": lambda: (dynamic_codes(a, *FORMAT), dynamic_codes(b, *FORMAT)),
        "torch._int_mm": lambda: [torch._int_mm(signed[i], weight[i]) for i in range(batch)],
        "oneDNN int8": lambda: [multiply(i, pack(i)) for i in range(batch)],
        "oneDNN int8, packed": lambda: [multiply(i, given[i]) for i in range(batch)],
    }
    if batch == 1:
        found["int8, all in all"] = lambda: _dynamic_product._product(a[0], b[0], *FORMAT, *FORMAT[:2])
    return found


def race(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    console, found = Console(), {}
    console.width = max(console.width, 150)
    names = list(contestants(1, 8, 8, 8))
    table = Table("batch, m x k x n", *names, title_justify="left")
    with torch.no_grad(), mock.patch.object(_dynamic_product, "LARGE", 0):
        for batch, m, k, n in SHAPES:
            rounds = max(2, min(options.rounds, 10**10 // (batch * m * k * n)))
            times = race(contestants(batch, m, k, n), rounds)
            found[f"{batch}, {m} x {k} x {n}"] = times
            table.add_row(f"{batch}, {m} x {k} x {n}", *(f"{times[c]:.3g}" if c in times else "" for c in names))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
