"""`inc-graph import-inc`: a folder that neural_compressor saved becomes one of ours."""

from __future__ import annotations

import argparse

from inc_graph.cli.result import Result, UsageError, table

NAME = "import-inc"
HELP = "make a saved folder of one that neural_compressor saved"
DESCRIPTION = """Make a saved folder of one that neural_compressor saved: qconfig.json and quantized_weight.pt with
weights of 2, 3, 4 or 8 bits, nf4 or fp4 (RTN, GPTQ, AWQ, TEQ, AutoRound). The weights are read with
torch.load(weights_only=True): nothing in the folder is executed. Load the result with load(DST, model)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("source", metavar="SRC", help="the folder that neural_compressor saved")
    parser.add_argument("destination", metavar="DST", help="the folder to write")
    parser.add_argument(
        "--in-features",
        metavar="LAYER=NUMBER",
        action="append",
        default=[],
        help="how many inputs a layer has; only needed for the layers that a warning names",
    )


def run(args: argparse.Namespace) -> Result:
    """Exit code 1 if the folder holds something else, or is damaged."""
    sizes = {}
    for text in args.in_features:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or int(number) < 1:
            raise UsageError(f"--in-features takes LAYER=NUMBER, not {text!r}")
        sizes[name] = int(number)
    from inc_graph.saving.import_inc import import_inc

    done = import_inc(args.source, args.destination, sizes)
    layers = [
        (x.path, x.qtype, f"{x.out_features} x {x.in_features}", x.group, "; ".join(x.remarks)) for x in done.layers
    ]
    text = table(done.method, ("layer", "format", "shape", "group", "remarks"), layers)
    text += f"\n{len(done.layers)} layers and {done.others} other tensors written to {args.destination}"
    text += "\nload it with inc_graph.quantization.load(folder, original_model=float_model)"
    data = {"source": args.source, "output": args.destination, "method": done.method, "other_tensors": done.others}
    return Result({**data, "layers": [x.to_json() for x in done.layers]}, text)
