"""A weight-only linear layer against bfloat16, by rows of the input: ``python -m benchmarks.weight_only_linear``.

Eight layers of 4096 x 4096 take turns, so that no cache holds them, and the contestants take turns too: each keeps its
best time over all rounds, so that a busy moment of the machine does not decide. Milliseconds a layer, and the speed
over bfloat16 of the same run. ``torch int4`` is torch's own packed kernel (asymmetric, group 32, bfloat16). With
``--compiled`` also ``inductor int4``: a 4-bit weight unpacked and multiplied by operators that torch.compile may fuse.
With ``--ipex`` (torch 2.8) the contestants are ours and the weight-only kernels of Intel Extension for PyTorch, on the
same codes and scales: inputs in bfloat16 and float32, computed in bfloat16 and in float32; and IPEX's ``int8`` mode,
which rounds the inputs to 8 bits, too, and so computes something else.
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


def dense(weight: Tensor, dtype: torch.dtype) -> Layer:
    """A float layer."""
    weight = weight.to(dtype)
    return lambda x: F.linear(x, weight)


Coded = tuple[Tensor, Tensor, Tensor | None]  # codes as they are stored, scales in float16, zero points


def coded(weight: Tensor, qtype: str, group: int) -> Coded:
    """A weight rounded to nearest."""
    block = [1, group]
    scale, zero = choose_qparams(weight, block, qtype, "asymmetric" if qtype == "uint4" else "symmetric")
    zeros = zero.to(torch.uint8) if qtype == "uint4" else None
    codes = quantize(weight, scale, zeros, block, qtype)
    return pack(codes, qtype) if get_qtype(qtype).storage_bits < 8 else codes, scale.to(torch.float16), zeros


def ours(weight: Coded, qtype: str, group: int, compute: torch.dtype) -> Layer:
    """One weight-only layer, as the inductor backend calls it."""
    codes, scale, zeros = weight
    return lambda x: wo.weight_only_linear(x, codes, scale, zeros, None, [1, group], qtype, compute)


def torch_int4(weight: Tensor) -> Layer:
    """torch's packed int4 layer."""
    scale, zero = choose_qparams(weight, [1, 32], "uint4", "asymmetric")
    codes = quantize(weight, scale, zero, [1, 32], "uint4").to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    table = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, table)


IPEX_FORMS = {"int4 g32": ("int4", 32), "int4 g128": ("int4", 128), "int8 channel": ("int8", -1)}
IPEX_WAYS = {  # dtype of the input, what ours computes in, IPEX's `lowp_mode`
    "bf16": (torch.bfloat16, torch.bfloat16, 2),
    "fp32 in": (torch.float32, torch.bfloat16, 2),
    "fp32 all": (torch.float32, torch.float32, 0),
}


def ipex(weight: Coded, qtype: str, group: int, mode: int) -> Layer:
    """IPEX's packed layer of the codes and scales that ours has."""
    codes, scale, _ = weight
    shape = [codes.shape[0], codes.shape[1] * (2 if qtype == "int4" else 1)]
    stored = codes ^ 0x88 if qtype == "int4" else codes  # its 4-bit codes count from 0
    scales = scale[:, 0].float().contiguous() if group < 0 else scale.float()
    form, act = (2 if qtype == "int4" else 1), (6 if mode == 3 else -1)  # one symmetric scale a row in int8 mode
    context = torch.ops.ipex_prepack.weight_only_qlinear_prepack(
        stored, form, shape, scales, None, None, None, None, group, mode, act, False
    )
    handle = context.get_data_handle()
    return lambda x, held=context: torch.ops.torch_ipex.ipex_woq_linear(x, handle)  # type: ignore[misc]


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

    found = {
        "fp32": (torch.float32, [dense(w, torch.float32) for w in weights]),
        "bf16": (torch.bfloat16, [dense(w, torch.bfloat16) for w in weights]),
        "torch int4": (torch.bfloat16, [torch_int4(w) for w in weights]),
    }
    if compiled:
        found["inductor int4"] = (torch.bfloat16, [inductor_int4(w) for w in weights])
    for name, (qtype, group) in OURS.items():
        found[name] = (torch.bfloat16, [ours(coded(w, qtype, group), qtype, group, compute) for w in weights])
    found["int4 g32, fp32 in"] = (torch.float32, found["int4 g32"][1])
    return found


def with_ipex(size: int) -> dict[str, tuple[torch.dtype, list[Layer]]]:
    """{name: (dtype of the input, layers)}: IPEX's beside ours."""
    import intel_extension_for_pytorch  # noqa: F401

    torch.manual_seed(0)
    weights = [torch.randn(size, size) / size**0.5 for _ in range(LAYERS)]
    found: dict[str, tuple[torch.dtype, list[Layer]]] = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        found[name] = (dtype, [dense(w, dtype) for w in weights])
    for form, (qtype, group) in IPEX_FORMS.items():
        codes = [coded(w, qtype, group) for w in weights]
        for way, (dtype, compute, mode) in IPEX_WAYS.items():
            found[f"{form} {way}"] = (dtype, [ours(c, qtype, group, compute) for c in codes])
            found[f"ipex {form} {way}"] = (dtype, [ipex(c, qtype, group, mode) for c in codes])
        found[f"ipex {form} int8"] = (torch.bfloat16, [ipex(c, qtype, group, 3) for c in codes])
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


def versus(results: dict[int, dict[str, float]]) -> Table:
    """Ours, IPEX's, and the speed of ours over IPEX's: above 1 ours is faster."""
    shown = Table("ms a layer", *(f"{rows} rows" for rows in results), title="weight-only linear: ours, IPEX, ratio")
    for name in ("fp32", "bf16"):
        shown.add_row(name, *(f"{ms[name]:.2f}" for ms in results.values()))
    for name in (n for n in next(iter(results.values())) if n.startswith("ipex")):
        peer = name.removeprefix("ipex ")
        peer = f"{peer.removesuffix(' int8')} bf16" if peer.endswith(" int8") else peer
        cells = [f"{ms[peer]:.2f} {ms[name]:.2f} {ms[name] / ms[peer]:.2f}" for ms in results.values()]
        shown.add_row(name[5:], *cells)
    return shown


@torch.no_grad()
def apart(entered: dict[str, tuple[torch.dtype, list[Layer]]], size: int) -> dict[str, float]:
    """{form: relative difference of IPEX's result from ours}."""
    x, found = torch.randn(5, size), {}
    for name in (n for n in entered if n.startswith("ipex") and n[5:] in entered):
        (dtype, theirs), (_, mine) = entered[name], entered[name[5:]]
        want = mine[0](x.to(dtype)).double()
        found[name[5:]] = float((theirs[0](x.to(dtype)).double() - want).norm() / want.norm())
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="what torch.compile makes of the operators, too")
    parser.add_argument("--ipex", action="store_true", help="ours and IPEX's, on the same codes (torch 2.8)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    compute = wo.fast_dtype()
    wo.taken.clear()
    before = os.getloadavg()
    with torch.no_grad():
        entered = with_ipex(args.size) if args.ipex else contestants(args.size, compute, args.compiled)
        results = {rows: race(rows, args.size, args.seconds, entered) for rows in args.rows}
    console = Console(width=200)
    for shown in [versus(results)] if args.ipex else [table(results, speed) for speed in (False, True)]:
        console.print(shown)
    facts = {
        "compute": str(compute), "taken": dict(wo.taken), "threads": args.threads,
        "load": [before, os.getloadavg()], "torch": torch.__version__,
    }  # fmt: skip
    if args.ipex:
        facts["difference"] = apart(entered, args.size)
    console.print(facts)
    if args.json:
        args.json.write_text(json.dumps({**facts, "ms": results}, indent=1), encoding="utf-8")
    return {**facts, "ms": results}


if __name__ == "__main__":
    main()
