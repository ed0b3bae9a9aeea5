"""`inc-graph load`: whether a saved folder loads here; with --check, whether all of it is in order."""

from __future__ import annotations

import argparse
from typing import Any

from inc_graph.cli.result import FAILED, OK, Result, UsageError

NAME = "load"
HELP = "load a saved folder; with --check look at all of it"
DESCRIPTION = """Load a saved folder on a backend of this machine, and print its report.

With --check, in this order: the manifest; size and hash of each file; the graph, verified; every node run again on fake
values, and shapes and dtypes compared with what is stored; the kernels made. With --run also one call on random inputs
made after the description of the inputs, compared with the reference. A model that was quantized layer by layer needs
the float model to be loaded; --check looks at each of its layers without it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("path", metavar="PATH", help="a saved folder")
    parser.add_argument("--check", action="store_true", help="look at all of it, step by step")
    parser.add_argument("--run", action="store_true", dest="call", help="with --check: also call it on random inputs")
    parser.add_argument("--backend", help="the backend to load it on (default: the one it was saved for)")
    parser.add_argument("--device", default="cpu", help="the device to load it on (default: cpu)")


def run(args: argparse.Namespace) -> Result:
    """Exit code 1 if a step of the check fails, or the folder does not load."""
    if args.call and not args.check:
        raise UsageError("--run belongs to --check")
    if not args.check:
        from inc_graph.quantization import load

        model = load(args.path, device=args.device, backend=args.backend)
        report: Any = model.report
        return Result({"path": args.path, "report": report.to_json()}, str(report))
    from inc_graph.cli.checks import check_folder

    steps = check_folder(args.path, args.backend, args.device, args.call)
    good = all(step.ok for step in steps)
    lines = [f"{'ok    ' if s.ok else 'FAILED'}  {s.name}: {s.detail}" for s in steps]
    lines.append(f"{args.path} is {'in order' if good else 'not in order'}")
    return Result(
        {"path": args.path, "ok": good, "checks": [s.to_json() for s in steps]},
        "\n".join(lines),
        OK if good else FAILED,
    )
