"""Quantize a language model to 4 bits: without data (RTN), and with a little text (GPTQ). It still generates.

`python -m examples.quantize_a_language_model`

The model is SmolLM2-135M, read from a package; `benchmarks/language_model.py` says how its weights are prepared. It
keeps its class, so that `generate()` works as before. Perplexity is that of two windows of Wikipedia text; GPTQ is
calibrated on other text.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import language_model as lm
from inc_graph.quantization import GPTQConfig, RTNConfig, convert, prepare, quantize

PROMPT = "The three primary colors are"


def rtn(model: Any, text: torch.Tensor) -> Any:
    return quantize(model, RTNConfig(bits=4, group_size=32))


def gptq(model: Any, text: torch.Tensor) -> Any:
    prepared = prepare(model, GPTQConfig(bits=4, group_size=32))
    for window in text:
        prepared(input_ids=window[None], use_cache=False)  # ends as soon as the first block has its inputs
    return convert(prepared)


def main() -> None:
    torch.set_num_threads(2)
    model, tokenizer = lm.smollm2()
    windows, text = lm.wiki_windows(tokenizer, 2), lm.calibration_windows(tokenizer, 4)
    prompt = lm.prompt_tokens(tokenizer, PROMPT)
    linears = sum(p.nbytes for name, p in model.named_parameters() if "_proj." in name)

    table = Table(title="SmolLM2-135M, the linear layers of its blocks", title_justify="left")
    table.add_column("weights")
    for name in ("perplexity", "MB", "s"):
        table.add_column(name, justify="right")
    written = {}
    for name, method in {"float32": None, "4-bit RTN": rtn, "4-bit GPTQ": gptq}.items():
        start = time.perf_counter()
        q_model = method(copy.deepcopy(model), text) if method else model
        seconds = time.perf_counter() - start
        size = sum(line.bytes for line in q_model.report.weights) if method else linears
        table.add_row(name, f"{lm.perplexity(q_model, windows):.2f}", f"{size / 1e6:.1f}", f"{seconds:.1f}")
        written[name] = tokenizer.decode(lm.continuations(q_model, [prompt])[0])
    Console(width=100).print(table)
    for name, continuation in written.items():
        print(f"{name:10}: {PROMPT}{continuation!r}")
    print(f"still a {type(q_model).__name__}")


if __name__ == "__main__":
    main()
