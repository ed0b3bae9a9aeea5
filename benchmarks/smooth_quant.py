"""SmoothQuant of SmolLM2 (perplexity) and MiniLM-L6 (SQNR), all contestants in one run:

`python -m benchmarks.smooth_quant [--model smollm2 minilm] [--only NAME ...]`

SmolLM2, folded: 8-bit weights and activations, linear layers without the output head, 8 x 512 tokens of calibration,
6 x 512 other tokens of evaluation; float 23.14. MiniLM: 64 documents of another corpus for calibration, SQNR of the
embeddings of 50 documents. "per token" is dynamic quantization.

What others get with the same data, from their own tools: a plain prototype of the paper, alpha 0.5: 29.62 and 15.4 dB;
NNCF's SmoothQuant with bias correction on MiniLM: 22.3 dB (`benchmarks.static_int8` runs it).
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.nn import functional as F

from benchmarks import language_model as lm
from benchmarks import real_models as rm
from inc_graph.export import export
from inc_graph.quantization import DynamicQuantConfig, SmoothQuantConfig, StaticQuantConfig, convert, prepare
from inc_graph.quantization.base_config import BaseConfig

CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "static": {},
    "static, alpha 0.5": {"alpha": 0.5},
    "static, alpha 0.8": {"alpha": 0.8},
    "static, auto": {"alpha": "auto"},
    "per token": {"dynamic": True},
    "per token, alpha 0.5": {"dynamic": True, "alpha": 0.5},
    "per token, auto": {"dynamic": True, "alpha": "auto"},
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def config(fields: dict[str, Any], skipped: str) -> BaseConfig:
    """Of linear layers but one; embeddings stay float."""
    fields = dict(fields)
    dynamic = fields.pop("dynamic", False)

    def but(found: BaseConfig, *others: Any) -> BaseConfig:
        for other in (*others, *[skipped] * bool(skipped)):
            found = found.set_local(other, type(found)(w_dtype="fp32"))
        return found

    static = but(SmoothQuantConfig(**fields) if "alpha" in fields else StaticQuantConfig(), nn.Embedding)
    if not dynamic:
        return static
    tokens = but(DynamicQuantConfig(act_granularity="per_token", w_granularity="per_channel"))
    return static + tokens if "alpha" in fields else tokens


def quantized(graph: fx.GraphModule, found: BaseConfig, data: Iterable[Any]) -> tuple[Callable[..., Any], float, str]:
    """(the model, seconds to convert, what became of the scales)."""
    prepared: Any = prepare(graph, found, inplace=False)
    with torch.no_grad():
        for batch in data:
            prepared(*batch)
    start = time.perf_counter()
    model: Any = convert(prepared)
    seconds = time.perf_counter() - start
    lines = model.report.smoothing
    alphas = [line.alpha for line in lines if line.alpha is not None]
    taken = f"{lines.count('absorbed')} absorbed, {lines.count('multiplied')} multiplied" if lines else ""
    return model, seconds, f"{taken}, alpha {min(alphas):g} to {max(alphas):g}" if alphas else taken


def smollm2(names: list[str]) -> Iterable[tuple[str, str, float, str]]:
    model, tokenizer = lm.smollm2()
    windows, data = lm.wiki_windows(tokenizer), [(w[None],) for w in lm.calibration_windows(tokenizer, 8)]
    graph = export(Logits(model).eval(), (windows[:1],))

    @torch.no_grad()
    def perplexity(run: Callable[..., Tensor]) -> float:
        losses = [F.cross_entropy(run(w[None])[0, :-1].float(), w[1:]).item() for w in windows]
        return math.exp(sum(losses) / len(losses))

    for name in names:
        fields = CONTESTANTS[name]
        if fields is None:
            yield name, f"{lm.perplexity(model, windows):.2f}", 0.0, ""
            continue
        run, seconds, note = quantized(graph, config(fields, "model.lm_head"), data)
        yield name, f"{perplexity(run):.2f}", seconds, note


def minilm(names: list[str]) -> Iterable[tuple[str, str, float, str]]:
    model, tokenizer, documents, _ = rm.minilm()
    data = list(rm.batches(tokenizer, rm.calibration_documents()))
    sizes = {0: torch.export.Dim("batch", min=1, max=64)}
    graph = export(model, data[0], dynamic_shapes=(sizes, sizes))
    want = rm.embed(model, tokenizer, documents)
    for name in names:
        fields = CONTESTANTS[name]
        if fields is None:
            continue
        run, seconds, note = quantized(graph, config(fields, ""), data)
        yield name, f"{rm.sqnr_db(want, rm.embed(run, tokenizer, documents)):.1f} dB", seconds, note


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=["smollm2", "minilm"], default=["smollm2", "minilm"])
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="copyreg")  # torch.export deprecates a class of its own
    torch.set_num_threads(2)
    for kind in chosen.model:
        title = "SmolLM2, perplexity" if kind == "smollm2" else "MiniLM-L6, SQNR of embeddings"
        table = Table(title=title, title_justify="left")
        for column in ("8 bits", "accuracy", "convert s", "scales"):
            table.add_column(column, justify="left" if column in ("8 bits", "scales") else "right")
        for name, value, seconds, note in (smollm2 if kind == "smollm2" else minilm)(chosen.only):
            table.add_row(name, value, f"{seconds:.0f}", note)
            print(f"{kind}: {name}: {value}, {seconds:.0f} s {note}", flush=True)
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
