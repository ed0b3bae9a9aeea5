"""`inc-graph quantize`: quantize a model from files."""

from __future__ import annotations

import argparse
import time
from typing import Any

from inc_graph.cli.result import Result, UsageError, size

NAME = "quantize"
HELP = "quantize a model and save it"
DESCRIPTION = """Quantize a model, with calibration data from a file, and save it as a folder.

MODEL is `package.module:function`, a function that returns the model (or the model itself): that module is imported, so
its code runs. Or it is a .pt2 file of torch.export.save: torch reads parts of such a file with pickle, so a file can
execute any code; it is refused without --trust-model.

CONFIG is a name such as static_quant, or a JSON file {algorithm: {"global": {field: value}, "local": {name: {field:
value}}}}.

DATA is a .safetensors or .npz file with one array for each input of the model, named as the input, whose first
dimension counts the samples. Or `package.module:function`, which returns an iterable of calls: a tuple of positional
inputs, a dictionary of named ones, or one tensor each. A .npz file with pickled objects is refused."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("model", metavar="MODEL", help="package.module:function, or a .pt2 file (see above)")
    parser.add_argument("--config", required=True, help="a JSON file, or the name of a method (see above)")
    parser.add_argument("--calibration", metavar="DATA", help="inputs to calibrate with (see above)")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--backend", default="auto", help="the backend to choose operators for (default: auto)")
    parser.add_argument("--device", help="move the model there first (default: where it is)")
    parser.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="samples in a call (default: what the model was exported for, or 1)",
    )
    parser.add_argument(
        "--samples", type=_positive, metavar="N", help="how many samples (from a function: calls) to use (default: all)"
    )
    parser.add_argument(
        "--dynamic-batch",
        action="store_true",
        help="export the model so that it takes any batch size; needs calls of 2 samples or more (--batch-size)",
    )
    parser.add_argument(
        "--layer-by-layer", action="store_true", help="do not export the model: quantize each layer in its place"
    )
    parser.add_argument("--trust-model", action="store_true", help="read a .pt2 file although it may execute code")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def run(args: argparse.Namespace) -> Result:
    """Exit code 1 if something cannot be read, or the model cannot be quantized."""
    exported = args.model.endswith(".pt2")
    if exported and (args.dynamic_batch or args.layer_by_layer):
        raise UsageError("--dynamic-batch and --layer-by-layer are for models that are not exported yet")
    in_file = str(args.calibration).endswith((".npz", ".safetensors"))
    if args.dynamic_batch and (args.layer_by_layer or (in_file and (args.batch_size or 1) < 2)):
        raise UsageError("--dynamic-batch needs --batch-size of 2 or more, and no --layer-by-layer")
    if exported and not args.trust_model:
        raise UsageError(
            "a .pt2 file can execute any code when it is read, since torch reads parts of it with pickle; "
            "give --trust-model if you know where it comes from"
        )
    from inc_graph.cli import sources
    from inc_graph.quantization import save

    start = time.perf_counter()
    with sources.current_folder_importable():
        model = sources.read_model(args.model, args.device)  # first: its module may register a method of its own
        config = sources.read_config(args.config)
        any_size = args.dynamic_batch or args.layer_by_layer
        calls = None
        if args.calibration is not None:
            calls = sources.read_calls(args.calibration, model, args.batch_size, args.samples, args.device, any_size)
        quantized, used = _quantize(model, config, calls, args)
    save(quantized, args.output)
    return _result(quantized, args, config.name, used, time.perf_counter() - start)


def _quantize(model: Any, config: Any, calls: Any, args: argparse.Namespace) -> tuple[Any, int]:
    """(the quantized model, how many calls it was calibrated with)."""
    import itertools

    from inc_graph.cli import sources
    from inc_graph.errors import ConfigError
    from inc_graph.quantization import convert, prepare
    from inc_graph.quantization.user_algorithms import needs_data

    needs = needs_data(config)
    if calls is None and needs:
        raise ConfigError(f"{config.name} needs calibration data", hint="give --calibration")
    calls = iter(calls if calls is not None else ())
    first = next(calls, None)
    if first is None and args.calibration is not None:
        raise ConfigError(f"{args.calibration} has no samples")
    example, shapes = None, None
    if first is not None and not args.layer_by_layer and not sources.is_graph(model):
        example = sources.as_example(model, first)
        shapes = sources.any_batch(example) if args.dynamic_batch else None
    prepared = prepare(model, config, example_inputs=example, dynamic_shapes=shapes, backend=args.backend)
    used = 0
    if needs and first is not None:
        used = sources.run_calls(prepared, itertools.chain([first], calls))
    return convert(prepared), used


def _result(quantized: Any, args: argparse.Namespace, method: str, used: int, seconds: float) -> Result:
    from inc_graph.cli.folder import Folder
    from inc_graph.quantization.layers import report_of
    from inc_graph.quantization.model import QuantizedModel

    report = quantized.report if isinstance(quantized, QuantizedModel) else report_of(quantized)
    files = {name: facts["bytes"] for name, facts in Folder(args.output).files.items()}
    data = {
        "output": str(args.output),
        "method": method,
        "calibration_calls": used,
        "seconds": seconds,
        "files": files,
        "report": report.to_json() if report is not None else None,
    }
    text = "" if report is None else f"{report}\n"
    text += f"saved to {args.output}: {size(sum(files.values()))}, calibrated with {used} calls, {seconds:.1f} s"
    return Result(data, text)
