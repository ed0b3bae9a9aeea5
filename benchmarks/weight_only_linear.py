"""A weight-only linear layer against bfloat16, by rows of the input: ``python -m benchmarks.weight_only_linear``.

Eight layers of 4096 x 4096 take turns, so that no cache holds them, and the contestants take turns too: each keeps its
best time over all rounds, so that a busy moment of the machine does not decide. Milliseconds a layer, and the speed
over bfloat16 of the same run. ``torch int4`` is torch's own packed kernel (asymmetric, group 32, bfloat16). With
``--compiled`` also ``inductor int4``: a 4-bit weight unpacked and multiplied by operators that torch.compile may fuse.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import inc_graph.lowering._weight_only as wo
from inc_graph.numerics import choose_qparams, quantize
from inc_graph.packing import pack
from inc_graph.qtypes import get_qtype

LAYERS = 8
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
OURS = {
    "int4 g32": ("int4", 32),
    "int4 g128": ("int4", 128),
    "uint4 g32 asym": ("uint4", 32),
    "int8 channel": ("int8", -1),
    "int3 g32": ("int3", 32),
    "nf4 g64": ("nf4", 64),
}
Layer = Callable[[Tensor], Tensor]


def ours(weight: Tensor, qtype: str, group: int, compute: torch.dtype) -> Layer:
    """One weight-only layer, as the inductor backend calls it."""
    block = [1, group]
    scale, zero = choose_qparams(weight, block, qtype, "asymmetric" if qtype == "uint4" else "symmetric")
    zeros = zero.to(torch.uint8) if qtype == "uint4" else None
    codes = quantize(weight, scale, zeros, block, qtype)
    stored, scale = pack(codes, qtype) if get_qtype(qtype).storage_bits < 8 else codes, scale.to(torch.float16)
    return lambda x: wo.weight_only_linear(x, stored, scale, zeros, None, block, qtype, compute)


def torch_int4(weight: Tensor) -> Layer:
    """torch's packed int4 layer."""
    scale, zero = choose_qparams(weight, [1, 32], "uint4", "asymmetric")
    codes = quantize(weight, scale, zero, [1, 32], "uint4").to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    table = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, table)


torch._dynamo.config.recompile_limit = 32  # a graph for each number of rows


@torch.compile(dynamic=False)
def _fused(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4], -1).view(len(packed), -1)
    groups = (nibbles.to(torch.int8) - 8).to(x.dtype).view(*scale.shape, -1) * scale[..., None]
    return F.linear(x, groups.view(len(packed), -1))


def inductor_int4(weight: Tensor) -> Layer:
    """Unpacking, scaling and the product as inductor compiles them."""
    scale, _ = choose_qparams(weight, [1, 32], "int4", "symmetric")
    codes = (quantize(weight, scale, None, [1, 32], "int4") + 8).to(torch.uint8)
    packed, scale = codes[:, ::2] | codes[:, 1::2] << 4, scale.to(torch.bfloat16)
    return lambda x: _fused(x, packed, scale)  # type: ignore[no-any-return]


def contestants(size: int, compute: torch.dtype, compiled: bool = False) -> dict[str, tuple[torch.dtype, list[Layer]]]:
    """{name: (dtype of the input, layers)}."""
    torch.manual_seed(0)
    weights = [torch.randn(size, size) / size**0.5 for _ in range(LAYERS)]

    def dense(w: Tensor, dtype: torch.dtype) -> Layer:
        w = w.to(dtype)
        return lambda x: F.linear(x, w)

    found = {
        "fp32": (torch.float32, [dense(w, torch.float32) for w in weights]),
        "bf16": (torch.bfloat16, [dense(w, torch.bfloat16) for w in weights]),
        "torch int4": (torch.bfloat16, [torch_int4(w) for w in weights]),
    }
    if compiled:
        found["inductor int4"] = (torch.bfloat16, [inductor_int4(w) for w in weights])
    for name, (qtype, group) in OURS.items():
        found[name] = (torch.bfloat16, [ours(w, qtype, group, compute) for w in weights])
    found["int4 g32, fp32 in"] = (torch.float32, [ours(w, "int4", 32, compute) for w in weights])
    return found


def race(rows: int, size: int, seconds: float, entered: dict[str, tuple[torch.dtype, list[Layer]]]) -> dict[str, float]:
    """{name: best milliseconds a layer}."""
    x = torch.randn(rows, size)
    best = dict.fromkeys(entered, float("inf"))
    inputs = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, (dtype, layers) in entered.items():
            start = time.perf_counter()
            for layer in layers:
                layer(inputs[dtype])
            best[name] = min(best[name], (time.perf_counter() - start) / len(layers) * 1e3)
        rounds += 1
    return best


def table(results: dict[int, dict[str, float]], speed: bool) -> Table:
    what = "speed over bf16" if speed else "ms a layer"
    shown = Table("rows", *(n for n in next(iter(results.values()))), title=f"weight-only linear, {what}")
    for rows, ms in results.items():
        shown.add_row(str(rows), *(f"{ms['bf16'] / t if speed else t:.2f}" for t in ms.values()))
    return shown


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="what torch.compile makes of the operators, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    compute = wo.fast_dtype()
    wo.taken.clear()
    before = os.getloadavg()
    with torch.no_grad():
        entered = contestants(args.size, compute, args.compiled)
        results = {rows: race(rows, args.size, args.seconds, entered) for rows in args.rows}
    console = Console(width=200)
    for speed in (False, True):
        console.print(table(results, speed))
    facts = {
        "compute": str(compute), "taken": dict(wo.taken), "threads": args.threads,
        "load": [before, os.getloadavg()], "torch": torch.__version__,
    }  # fmt: skip
    console.print(facts)
    if args.json:
        args.json.write_text(json.dumps({**facts, "ms": results}, indent=1), encoding="utf-8")
    return {**facts, "ms": results}


if __name__ == "__main__":
    main()
