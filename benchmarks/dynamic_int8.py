"""Dynamic INT8 of MiniLM-L6 and of SmolLM2 beside others, in one run: ``python -m benchmarks.dynamic_int8``.

MiniLM-L6: milliseconds of a call (batch 8 x 128 tokens and batch 1, contestants in turns) and SQNR of the sentence
embeddings against the float model's. SmolLM2 (folded weights, see ``language_model``; linear layers without the head):
perplexity. LSTM and GRU layers beside torch's: see ``recurrent_int8``. What a contestant cannot do becomes its row.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import language_model as lm
from benchmarks import peers, recurrent_int8, static_int8
from benchmarks.peers import THREADS, Peer, Task

TOKENS = {"act_granularity": "per_token", "w_granularity": "per_channel"}
CONFIGS: dict[str, dict[str, Any]] = {
    "per token": TOKENS,
    "per token, mse weights": {**TOKENS, "w_algo": "mse"},
    "per token, symmetric": {**TOKENS, "act_sym": True},
    "per tensor": {"w_granularity": "per_channel"},
    "per tensor, defaults": {},
}
OURS = "inc_graph dynamic, per token"
MODELS = ("minilm", "smollm2", "recurrent")


def _ours(options: dict[str, Any], compiled: bool = False) -> Any:
    def contestant(task: Task) -> Peer:
        from inc_graph.lowering._dynamic import taken
        from inc_graph.quantization import DynamicQuantConfig, quantize

        model: Any = quantize(peers._exported(task), DynamicQuantConfig(**options))
        taken.clear()
        model(*task.calibration[0])
        note = f"{model.report.count('linear')} linear layers, {taken['gemm']} products in int8"
        return Peer(peers._compile(model) if compiled else model, note)

    return contestant


def torch_dynamic(task: Task) -> Peer:
    """`torch.ao.quantization.quantize_dynamic`, which torch calls deprecated."""
    model = copy.deepcopy(task.model)
    return Peer(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), "per tensor")


def torchao_dynamic(task: Task) -> Peer:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(task.model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return Peer(peers._compile(model), "per token, symmetric, compiled")


CONTESTANTS: dict[str, Any] = {
    "torch fp32 eager": peers.eager,
    "inductor fp32 frozen": peers.inductor,
    "torch.ao dynamic": torch_dynamic,
    "torchao dynamic": torchao_dynamic,
    "onnxruntime dynamic int8": peers.onnxruntime_dynamic,
    "OpenVINO + NNCF int8": peers.openvino_nncf,
    **{f"inc_graph dynamic, {name}": _ours(options) for name, options in CONFIGS.items()},
    f"{OURS}, compiled": _ours(TOKENS, compiled=True),
}


def minilm(names: list[str], rounds: int, console: Console) -> list[dict[str, Any]]:
    race = static_int8.minilm()
    batch = next(iter(race.timed.values()))
    race = replace(race, timed={**race.timed, "batch 1 x 128": tuple(x[:1] for x in batch)})
    peers.CONTESTANTS.update(CONTESTANTS)
    rows = static_int8.measure(race, names, rounds, console.log)
    console.print(static_int8.table(race, rows))
    for row in rows:
        if row.note:
            console.print(f"{row.contestant}: {row.note}", highlight=False, soft_wrap=True)
    return [asdict(row) for row in rows]


def smollm2(windows: int, console: Console) -> dict[str, float]:
    """Perplexity of W8A8 without the head, by config."""
    from inc_graph.quantization import DynamicQuantConfig, quantize

    model, tokenizer = lm.smollm2()
    text = list(lm.wiki_windows(tokenizer, windows))
    found = {"float32": lm.perplexity(model, text)}
    plans = {"8-bit weights alone": {"act_dtype": "fp32", "w_granularity": "per_channel"}, **CONFIGS}
    for name, options in plans.items():
        config = DynamicQuantConfig(**options).set_local("lm_head", DynamicQuantConfig(w_dtype="fp32"))
        found[name] = lm.perplexity(quantize(copy.deepcopy(model), config), text)
        console.log(f"{name}: {found[name]:.2f}")
    table = Table("SmolLM2, folded, W8A8 dynamic", "perplexity", title_justify="left")
    for name, value in found.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--windows", type=int, default=6, help="of 512 tokens, for perplexity")
    parser.add_argument("--model", choices=MODELS, nargs="*", default=MODELS)
    parser.add_argument("--only", nargs="*", metavar="TEXT", help="contestants whose name contains one of these")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(arguments)
    names = [n for n in CONTESTANTS if not options.only or any(text.lower() in n.lower() for text in options.only)]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)  # of the other packages
    console = Console()
    console.width = max(console.width, 110)
    results: dict[str, Any] = {}
    if "minilm" in options.model:
        static_int8.OURS = OURS
        results["minilm"] = minilm(names, options.rounds, console)
    if "smollm2" in options.model:
        results["smollm2"] = smollm2(options.windows, console)
    if "recurrent" in options.model:
        with torch.no_grad():
            results["recurrent"] = recurrent_int8.measure(options.rounds, console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
