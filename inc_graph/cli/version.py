"""`inc-graph version`: versions, and what of the machine was detected."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import inc_graph
from inc_graph.cli.result import FAILED, OK, Result, pairs, size
from inc_graph.errors import IncError

NAME = "version"
HELP = "versions; with --verbose what of the machine was detected, and which backends can run here"
DESCRIPTION = "Versions; with --verbose what of the machine was detected, and which backends can run here and why not."

_ALWAYS = ("torch",)
_PACKAGES = ("torch", "intel_extension_for_pytorch", "transformers", "torchao", "safetensors", "numpy")
_INSTRUCTIONS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
    "amx_bf16", "amx_fp16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_PLANNED = ("cuda", "hpu", "ipex")
_VARIABLES = ("INC_", "LOGLEVEL", "LOCAL_RANK", "WORLD_SIZE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("--verbose", "-v", action="store_true", help="also the machine, the backends and the settings")


def run(args: argparse.Namespace) -> Result:
    """Exit code 1 if a setting makes it impossible to choose a device or backend."""
    data: dict[str, Any] = {
        "inc_graph": inc_graph.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (_PACKAGES if args.verbose else _ALWAYS)},
    }
    code = OK
    if args.verbose:
        data |= _detected()
        code = FAILED if "error" in data["chosen"] else OK
    return Result(data, _text(data), code)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _detected() -> dict[str, Any]:
    import torch

    from inc_graph.registry import BACKENDS
    from inc_graph.utils.cpu import cpu_info
    from inc_graph.utils.device import DEVICES, choose_backend, detect_device, is_device_available

    flags = cpu_info._flags
    machine = {
        "cpu": cpu_info.brand_raw,
        "architecture": platform.machine(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "sockets": cpu_info.sockets,
        "cores": cpu_info.cores,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
    }
    accelerators = {n: _devices(n) if is_device_available(n) else [] for n in DEVICES if n != "cpu"}
    backends = {name: backend.available() for name, backend in BACKENDS.items()}
    backends |= {name: "not in this version" for name in _PLANNED if name not in backends}
    chosen: dict[str, Any]
    try:
        device = detect_device()
        backend, note = choose_backend("auto", device)
        chosen = {"device": device, "backend": backend, "note": note or None}
    except IncError as e:
        chosen = {"error": str(e)}
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    return {
        "machine": machine,
        "accelerators": accelerators,
        "chosen": chosen,
        "backends": {name: {"available": reason is None, "reason": reason} for name, reason in backends.items()},
        "settings": settings,
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not told by this system
        return None


def _devices(kind: str) -> list[str]:
    import torch

    module = getattr(torch, kind)
    return [str(module.get_device_name(i)) for i in range(module.device_count())]


def _text(data: dict[str, Any]) -> str:
    rows: list[tuple[str, Any]] = [("inc_graph", data["inc_graph"]), ("python", data["python"])]
    rows += [(name, version or "not installed") for name, version in data["packages"].items()]
    rows.append(("platform", data["platform"]))
    if "machine" not in data:
        return pairs(rows)
    machine, chosen = data["machine"], data["chosen"]
    detected = ", ".join(machine["instructions"]) or "none that the system tells of"
    cores = f"{machine['cores']} in {machine['sockets']} sockets, {machine['usable_cores']} usable"
    rows += [
        ("cpu", machine["cpu"] or machine["architecture"]),
        ("instructions", f"{detected}; torch uses {machine['torch_uses']}"),
        ("cores", f"{cores}, {machine['threads']} threads"),
        ("memory", size(machine["memory_bytes"])),
        *((kind, ", ".join(found) or "none") for kind, found in data["accelerators"].items()),
    ]
    if "error" in chosen:
        rows.append(("chosen", f"nothing: {chosen['error']}"))
    else:
        rows += [("device", chosen["device"]), ("backend", chosen["backend"]), ("note", chosen["note"])]
    for name, facts in data["backends"].items():
        rows.append((f"  {name}", "available" if facts["available"] else f"not available: {facts['reason']}"))
    rows += data["settings"].items()
    return pairs(rows)
