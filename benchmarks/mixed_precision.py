"""bfloat16 of MiniLM-L6 and EfficientNet-Lite0 beside torch.autocast: ``python -m benchmarks.mixed_precision``.

The contestants take turns and each keeps its best time. SQNR in dB against the float32 model: of the sentence
embeddings and the hidden states, of the logits. Bytes are those of the weights in memory and in the saved folder. With
``--int8`` static INT8 with and without bfloat16 for the rest is in the race too.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import real_models as rm
from inc_graph.quantization import MixedPrecisionConfig, StaticQuantConfig, convert, quantize
from inc_graph.report import attribute_bytes

Run = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]


@dataclass
class Race:
    name: str
    model: nn.Module
    inputs: dict[str, Inputs]  # label -> what is timed; accuracy is that on the first
    calibration: Callable[[int], list[Inputs]]  # in batches of a size
    outputs: Callable[[Tensor, Inputs], dict[str, Tensor]]


def minilm() -> Race:
    model, tokenizer, documents, _ = rm.minilm()
    batches = list(rm.batches(tokenizer, documents, 8))

    def calibration(size: int) -> list[Inputs]:
        return list(rm.batches(tokenizer, rm.calibration_documents(64), size))

    def outputs(hidden: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        mask = inputs[1]
        return {"embedding": rm.mean_pool(hidden.float(), mask), "hidden": hidden.float()[mask.bool()]}

    return Race("MiniLM-L6", model, {"8 x 128": batches[0]}, calibration, outputs)


def efficientnet() -> Race:
    model, images, _ = rm.efficientnet_lite0()
    inputs = {"batch 16": (images[:16],), "batch 1": (images[:1].clone(),)}

    def calibration(size: int) -> list[Inputs]:
        return [(batch,) for batch in rm.calibration_images(max(32, size)).split(size)]

    return Race("EfficientNet-Lite0", model, inputs, calibration, lambda y, _: {"logits": y.float()})


def _compiled(model: nn.Module) -> nn.Module:
    torch._inductor.config.freezing = True  # type: ignore[attr-defined]
    torch._dynamo.reset()
    return torch.compile(model)  # type: ignore[return-value]


def _autocast(model: Run) -> Run:
    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs)

    return run


def contestants(race: Race, label: str, int8: bool) -> dict[str, Callable[[], tuple[Run, nn.Module | None]]]:
    """Name -> what builds it: (what is called, the model with its weights)."""
    inputs = race.inputs[label]

    def ours() -> nn.Module:
        return convert(race.model, MixedPrecisionConfig(dtype="bf16"), example_inputs=inputs)

    def quantized(config: Any) -> nn.Module:
        data = race.calibration(len(inputs[0]))
        return quantize(race.model, config, lambda m: [m(*x) for x in data], example_inputs=inputs)

    def both(make: Callable[[], nn.Module]) -> Callable[[], tuple[Run, nn.Module]]:
        def built() -> tuple[Run, nn.Module]:
            model = make()
            return model, model

        return built

    found: dict[str, Callable[[], tuple[Run, nn.Module | None]]] = {
        "float32": lambda: (race.model, race.model),
        "autocast": lambda: (_autocast(race.model), None),
        "autocast, inductor": lambda: (_autocast(_compiled(copy.deepcopy(race.model))), None),
        "bf16 pass": both(ours),
        "bf16 pass, compiled": lambda: (_compiled(ours()), None),
    }
    if int8:
        found["static int8"] = both(lambda: quantized(StaticQuantConfig()))
        found["static int8 + bf16"] = both(lambda: quantized(StaticQuantConfig() + MixedPrecisionConfig(dtype="bf16")))
    return found


def _folder_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))


@torch.no_grad()
def measure(race: Race, label: str, rounds: int, int8: bool) -> Table:
    """One table: a line a contestant."""
    inputs = race.inputs[label]
    reference = race.outputs(race.model(*inputs), inputs)
    table = Table(title=f"{race.name}, {label}", title_justify="left")
    for name in ("", "ms", *(f"{k} dB" for k in reference), "bytes in memory", "bytes on disk"):
        table.add_column(name, justify="left" if not name else "right")
    runs, rows = {}, {}
    for name, make in contestants(race, label, int8).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run, model = make()
            found = race.outputs(run(*inputs).clone(), inputs)
        noise = [f"{rm.sqnr_db(reference[k], found[k]):.1f}" for k in reference]
        memory = "" if model is None else f"{attribute_bytes(model):,}"
        disk = f"{_folder_bytes(model):,}" if hasattr(model, "save") else ""
        runs[name], rows[name] = run, [*noise, memory, disk]
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(2):
                start = time.perf_counter()
                run(*inputs)
                best[name] = min(best[name], time.perf_counter() - start)
    for name, row in rows.items():
        table.add_row(name, f"{best[name] * 1e3:.2f}", *row)
    return table


RACES: dict[str, Callable[[], Race]] = {"minilm": minilm, "efficientnet": efficientnet}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(RACES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--int8", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        race = RACES[name]()
        for label in race.inputs:
            Console(width=120).print(measure(race, label, arguments.rounds, arguments.int8))


if __name__ == "__main__":
    main()
