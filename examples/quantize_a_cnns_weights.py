"""Quantize only the weights of a convolutional network: a smaller file, no data, float computation.

`python -m examples.quantize_a_cnns_weights`

The model is EfficientNet-Lite0, judged by 20 labelled photographs. `RTNConfig` speaks of linear layers; `set_local`
adds the convolutions. A layer that reads few numbers for each output (the first one, and the depthwise ones) has hardly
any weights, and no room for groups that share a scale: it keeps 8 bits.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import real_models as rm
from inc_graph.export import export
from inc_graph.quantization import RTNConfig, quantize

EIGHT, FOUR = {"bits": 8, "group_size": -1}, {"bits": 4, "group_size": 32, "use_sym": False, "use_mse_search": True}


def wide(layer: Any) -> bool:
    """Whether an output of the layer reads 32 numbers and more; weights are [out, in, ...]."""
    return layer.weight_shape is not None and math.prod(layer.weight_shape[1:]) >= 32


CONFIGS = {
    "8-bit": RTNConfig(**EIGHT).set_local(nn.Conv2d, RTNConfig(**EIGHT)),
    "4-bit": RTNConfig(bits=4, group_size=-1).set_local(nn.Conv2d, RTNConfig(bits=4, group_size=-1)),
    "4-bit, 8-bit where few are read": RTNConfig(**EIGHT)
    .set_local(nn.Conv2d, RTNConfig(**EIGHT))
    .set_local(wide, RTNConfig(**FOUR)),
}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    model, photographs, labels = rm.efficientnet_lite0()
    batch = torch.export.Dim("batch", min=1, max=256)
    exported = export(model, (photographs[:2],), dynamic_shapes=({0: batch},))
    logits = model(photographs)

    table = Table(title="EfficientNet-Lite0, weights only", title_justify="left")
    table.add_column("weights")
    for name in ("top-1", "logits dB", "MB on disk"):
        table.add_column(name, justify="right")
    size = sum(t.nbytes for t in model.state_dict().values())
    table.add_row("float32", f"{rm.top_k(logits, labels)}/{len(labels)}", "", f"{size / 1e6:.2f}")
    for name, config in CONFIGS.items():
        q_model = quantize(exported, config, inplace=False)
        result = q_model(photographs)
        with tempfile.TemporaryDirectory() as folder:
            q_model.save(Path(folder) / "model")
            size = sum(f.stat().st_size for f in (Path(folder) / "model").iterdir())
        top1 = f"{rm.top_k(result, labels)}/{len(labels)}"
        table.add_row(name, top1, f"{rm.sqnr_db(logits, result):.1f}", f"{size / 1e6:.2f}")
    Console(width=100).print(table)
    print(q_model.report)


if __name__ == "__main__":
    main()
