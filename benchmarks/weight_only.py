"""Weight-only quantization of SmolLM2 (and of a CNN), beside other quantizers: ``python -m benchmarks.weight_only``.

SmolLM2 is the folded model of `benchmarks.language_model`. It is judged by the perplexity of 6 windows of 512 tokens,
by how often the most probable next token is that of the float model, and by what it writes; 64 windows of later text
calibrate. Each line of the table is a process of its own with two threads; the peers follow right after ours.

Seconds are those of prepare, calibration and convert: importing and loading do not count. Bytes are of all tensors that
can be reached from the model after it has been called, against bfloat16: of the quantized layers with their scales, and
of the whole model, whose other layers are float32.

``--peers`` needs the extra ``[bench]``; ``--quick`` takes 4 of the 30 blocks and little text: does it run?
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import language_model as lm
from benchmarks import real_models as rm
from benchmarks.fresh_process import Failed, answer, measure
from benchmarks.peers import THREADS
from benchmarks.tensor_bytes import shares

LINEARS = r"_proj\."  # the layers of the blocks, by the names of their tensors
OURS = "inc_graph"
ALL = rf"{LINEARS}|embed_tokens\.|lm_head\."


@dataclass(frozen=True)
class Setting:
    """A method with its options, in the words that this library and neural_compressor share.

    ``config`` makes the config from such a package; ``layers`` (a pattern) says which tensors' layers it quantizes;
    ``writes``: also compare what the model writes. ``compute_dtype``: what this library's layers multiply in.
    """

    name: str
    config: Callable[[Any], Any]
    layers: str = LINEARS
    writes: bool = False
    only_ours: bool = False
    compute_dtype: str | None = None

    @property
    def method(self) -> str:
        return self.name.split()[0].lower()

    def takes(self, contestant: str) -> bool:
        """Whether the contestant has something of the kind."""
        return contestant == OURS or (not self.only_ours and contestant in ("neural_compressor", self.method))


def _rtn(name: str, **options: Any) -> Setting:
    return Setting(f"RTN {name}", lambda q: q.RTNConfig(**options))


def _gptq(name: str, **options: Any) -> Setting:
    return Setting(f"GPTQ {name}", lambda q: q.GPTQConfig(**options))


def _preset(name: str) -> Setting:
    return Setting(f"RTN {name}", lambda q: q.get_default_double_quant_config(name))


def _everything(q: Any) -> Any:
    config = q.RTNConfig(bits=4, group_size=32, quant_lm_head=True)
    return config.set_local(nn.Embedding, q.RTNConfig(bits=4, group_size=32))


SETTINGS = (
    _rtn("4-bit g32 sym", bits=4, group_size=32),
    _rtn("4-bit g32 sym, search", bits=4, group_size=32, use_mse_search=True),
    _rtn("4-bit g64 asym", bits=4, group_size=64, use_sym=False),
    _rtn("3-bit g64 asym", bits=3, group_size=64, use_sym=False),
    Setting("RTN 8-bit", lambda q: q.RTNConfig(bits=8, group_size=-1), writes=True),
    Setting(
        "RTN 8-bit g16 asym, float32",
        lambda q: q.RTNConfig(bits=8, group_size=16, use_sym=False),
        writes=True,
        only_ours=True,
        compute_dtype="float32",
    ),
    Setting(
        "GPTQ 8-bit g32 asym, float32",
        lambda q: q.GPTQConfig(bits=8, group_size=32, use_sym=False),
        writes=True,
        only_ours=True,
        compute_dtype="float32",
    ),
    _rtn("nf4 g32", dtype="nf4", group_size=32),
    _rtn("fp4 g32", dtype="fp4", group_size=32),
    _preset("BNB_NF4"),
    _preset("GGML_TYPE_Q4_K"),
    Setting("RTN 4-bit g32 sym, all layers", _everything, layers=ALL, only_ours=True),
    Setting("HQQ 4-bit g64", lambda q: q.HQQConfig(bits=4, group_size=64)),
    _gptq("4-bit g32 sym", bits=4, group_size=32),
    _gptq("4-bit g32 sym, search", bits=4, group_size=32, use_mse_search=True),
    _gptq("4-bit g64 asym", bits=4, group_size=64, use_sym=False),
    _gptq("4-bit g64 asym, act_order", bits=4, group_size=64, use_sym=False, act_order=True),
    _gptq("4-bit g64 asym, static_groups", bits=4, group_size=64, use_sym=False, static_groups=True),
    _gptq("4-bit g64 asym, both", bits=4, group_size=64, use_sym=False, act_order=True, static_groups=True),
)


def _has_groups(layer: Any) -> bool:
    return layer.weight_shape is not None and math.prod(layer.weight_shape[1:]) >= 32


def _cnn(name: str, method: str, bits: int, groups: bool = False) -> Setting:
    """Per channel; with ``groups`` the layers of which an output has 32 inputs and more are 4-bit in groups instead."""

    def config(q: Any) -> Any:
        kind = getattr(q, f"{method}Config")
        made = kind(bits=bits, group_size=-1).set_local(nn.Conv2d, kind(bits=bits, group_size=-1))
        return made.set_local(_has_groups, kind(bits=4, group_size=32)) if groups else made

    return Setting(f"{method} {name}", config, layers=".", only_ours=True)


CNN = (
    _cnn("8-bit per channel", "RTN", 8),
    _cnn("4-bit per channel", "RTN", 4),
    _cnn("4-bit per channel", "GPTQ", 4),
    _cnn("4-bit g32, layers of few inputs 8-bit", "RTN", 8, groups=True),
    _cnn("4-bit g32, layers of few inputs 8-bit", "GPTQ", 8, groups=True),
)


# --- one measurement, in a process of its own ------------------------------------------------------------------------


@dataclass
class Row:
    """Perplexity, the share of next tokens that are the float model's, seconds, bytes against bfloat16."""

    setting: str
    contestant: str
    perplexity: float | None = None
    agreement: float | None = None
    same_text: int | None = None
    seconds: float | None = None
    layers: float | None = None
    model: float | None = None
    note: str = ""


Quantizer = Callable[[nn.Module, Tensor], nn.Module]  # float model, calibration windows -> quantized model


def by_config(package: str, setting: Setting) -> Quantizer:
    """For a package with the interface of neural_compressor.torch.quantization."""
    q = importlib.import_module(package)
    config = setting.config(q)

    def quantize(model: nn.Module, calibration: Tensor) -> nn.Module:
        prepared = q.prepare(model, config)
        for window in calibration if setting.method == "gptq" else ():
            prepared(input_ids=window[None], use_cache=False)
        return (
            q.convert(prepared, compute_dtype=setting.compute_dtype)
            if package.startswith(OURS)
            else q.convert(prepared)
        )

    return quantize


def by_hqq(setting: Setting) -> Quantizer:
    """The package of HQQ's authors, for 4 bits in groups of 64; its linear layers are put in one by one."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def quantize(model: nn.Module, calibration: Tensor) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and re.search(setting.layers, f"{name}."):
                config = BaseQuantizeConfig(nbits=4, group_size=64)
                model.set_submodule(name, HQQLinear(module, config, compute_dtype=torch.float32, device="cpu"))
        return model

    return quantize


PEERS: dict[str, tuple[str, Callable[[Setting], Quantizer]]] = {  # name -> (distribution, what quantizes)
    OURS: ("inc_graph", partial(by_config, "inc_graph.quantization")),
    "neural_compressor": ("neural-compressor-pt", partial(by_config, "neural_compressor.torch.quantization")),
    "hqq": ("hqq", by_hqq),
}


def evaluate(task: dict[str, Any]) -> dict[str, Any]:
    """Quantize and judge SmolLM2: the fields of a `Row`. ``task`` names setting and contestant, and the folder."""
    from transformers import LlamaForCausalLM

    folder = Path(task["folder"])
    data, texts = load_file(folder / "data.safetensors"), json.loads((folder / "texts.json").read_text())
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    setting = next(s for s in SETTINGS if s.name == task["setting"])
    bf16 = {name: 2 * p.numel() for name, p in model.named_parameters()}
    quantize = PEERS[task["contestant"]][1](setting)
    start = time.perf_counter()
    model = quantize(model, data["calibration"])
    seconds = time.perf_counter() - start
    perplexity, best = lm.next_tokens(model, data["windows"])
    same = None
    if setting.writes:
        written = lm.continuations(model, [torch.tensor(prompt) for prompt, _ in texts])
        same = sum(found == wanted for found, (_, wanted) in zip(written, texts, strict=True))
    layers, whole = shares(model, bf16, setting.layers)
    return {
        "perplexity": perplexity,
        "agreement": (best == data["best"]).double().mean().item(),
        "same_text": same,
        "seconds": seconds,
        "layers": layers,
        "model": whole,
    }


# --- all of them -----------------------------------------------------------------------------------------------------


def write_task(folder: Path, quick: bool) -> Row:
    """The float model, its data and what it says of them, for the processes to load. Returns the float model's row."""
    model, tokenizer = lm.smollm2()
    windows, calibration, prompts = lm.wiki_windows(tokenizer), lm.calibration_windows(tokenizer), lm.PROMPTS
    if quick:
        windows, calibration, prompts = windows[:2, :128], calibration[:8, :128], prompts[:2]
        del model.model.layers[4:]
        model.config.num_hidden_layers = 4
    perplexity, best = lm.next_tokens(model, windows)
    data = {"windows": windows, "calibration": calibration, "best": best}
    save_file({name: t.contiguous() for name, t in data.items()}, folder / "data.safetensors")
    ids = [lm.prompt_tokens(tokenizer, prompt) for prompt in prompts]
    texts = [(i.tolist(), written) for i, written in zip(ids, lm.continuations(model, ids), strict=True)]
    (folder / "texts.json").write_text(json.dumps(texts))
    with lm.quiet():
        model.save_pretrained(folder / "model")
    layers, whole = shares(model, {name: 2 * p.numel() for name, p in model.named_parameters()}, LINEARS)
    return Row("float32", "torch", perplexity, 1.0, len(texts), None, layers, whole)


def race(settings: list[Setting], contestants: list[str], quick: bool, say: Callable[[str], object]) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        rows = [write_task(Path(folder), quick)]
        say(f"float32: perplexity {rows[0].perplexity:.4g}")
        for setting in settings:
            for name in contestants:
                if not setting.takes(name):
                    continue
                row = Row(setting.name, name)
                try:
                    task = {"setting": setting.name, "contestant": name, "folder": folder}
                    row = Row(setting.name, name, **measure("benchmarks.weight_only", task, THREADS))
                    say(f"{setting.name}, {name}: perplexity {row.perplexity:.4g}, {row.seconds:.1f} s")
                except Failed as error:
                    row.note = f"failed: {error}"
                    say(f"{setting.name}, {name}: {row.note}")
                rows.append(row)
    return rows


def _calibrate(model: nn.Module) -> None:
    for images in rm.calibration_images().split(20):
        model(images)


def cnn() -> list[dict[str, Any]]:
    """EfficientNet-Lite0 with quantized weights: rows of setting, top-1, SQNR in dB, bytes against bfloat16."""
    q = importlib.import_module("inc_graph.quantization")
    rows = []
    for setting in CNN:
        model, photographs, labels = rm.efficientnet_lite0()
        with torch.no_grad():
            reference = model(photographs)
            bf16 = {name: 2 * p.numel() for name, p in model.named_parameters()}
            run = _calibrate if setting.method == "gptq" else None
            model = q.quantize(model, setting.config(q), run, example_inputs=(photographs,))
            logits = model(photographs)
        top1, db = rm.top_k(logits, labels), rm.sqnr_db(reference, logits)
        rows.append({"setting": setting.name, "top1": top1, "of": len(labels), "sqnr_db": db,
                     "model": shares(model, bf16, setting.layers)[1]})  # fmt: skip
    return rows


def table(rows: list[Row]) -> Table:
    shown = Table(title=f"SmolLM2-135M, folded; {THREADS} threads; bytes against bfloat16", title_justify="left")
    for name in ("setting", ""):
        shown.add_column(name, no_wrap=True)
    for name in ("perplexity", "same next\ntoken", "same 20\ntokens", "s", "x of\npeer", "layers", "model"):
        shown.add_column(name, justify="right", no_wrap=True)
    peers = {(row.setting, row.contestant): row.seconds for row in rows}
    for row in rows:
        peer = peers.get((row.setting, "neural_compressor"))
        ratio = f"{row.seconds / peer:.2f}" if row.seconds and peer and row.contestant == OURS else ""
        cells = [
            "failed" if row.perplexity is None else f"{row.perplexity:.4g}",
            "" if row.agreement is None else f"{row.agreement:.1%}",
            "" if row.same_text is None else str(row.same_text),
            "" if row.seconds is None else f"{row.seconds:.1f}",
            ratio,
            "" if row.layers is None else f"{row.layers:.3f}",
            "" if row.model is None else f"{row.model:.3f}",
        ]
        shown.add_row(row.setting, row.contestant, *cells, style="bold" if row.contestant == OURS else None)
    return shown


def cnn_table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="EfficientNet-Lite0, weights only (float32: 17 of 20)", title_justify="left")
    shown.add_column("setting")
    for name in ("top-1", "logits dB", "bytes / bf16"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(row["setting"], f"{row['top1']}/{row['of']}", f"{row['sqnr_db']:.1f}", f"{row['model']:.3f}")
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="METHODS", default="rtn,hqq,gptq,cnn", help="some of rtn,hqq,gptq,cnn")
    parser.add_argument(
        "--setting", nargs="*", metavar="TEXT", help="settings of such a name, or whose name contains it"
    )
    parser.add_argument("--peers", action="store_true", help="the other quantizers too")
    parser.add_argument("--quick", action="store_true", help="4 of 30 blocks and little text: does it run?")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    settings = [s for s in SETTINGS if s.method in only]
    if options.setting is not None:
        whole = {s.name.lower() for s in SETTINGS}
        asked = [text.lower() for text in options.setting]
        settings = [s for s in settings if any(
            s.name.lower() == text if text in whole else text in s.name.lower() for text in asked)]  # fmt: skip
    contestants = list(PEERS) if options.peers else [OURS]

    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    console = Console()
    console.width = max(console.width, 120)
    results: dict[str, Any] = {"versions": {"torch": torch.__version__}}
    for name in contestants:
        try:
            results["versions"][name] = version(PEERS[name][0])
        except PackageNotFoundError:
            parser.error(f"{PEERS[name][0]} is not installed: pip install 'inc_graph[bench]'")
    if settings:
        rows = race(settings, contestants, options.quick, console.log)
        console.print(table(rows))
        for row in rows:
            if row.note:
                console.print(f"{row.setting}, {row.contestant}: {row.note}", highlight=False, soft_wrap=True)
        results["SmolLM2"] = [asdict(row) for row in rows]
    if "cnn" in only and not options.setting:
        results["EfficientNet-Lite0"] = cnn()
        console.print(cnn_table(results["EfficientNet-Lite0"]))
    console.print(", ".join(f"{name} {number}" for name, number in results["versions"].items()), highlight=False)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if not answer(evaluate):
        main()
