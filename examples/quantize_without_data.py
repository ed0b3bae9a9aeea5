"""No calibration data: activations are quantized with the range that each token has.

`python -m examples.quantize_without_data`
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.quantization import DynamicQuantConfig, quantize


def sqnr(reference: Tensor, test: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - test).square().sum()))


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, activation="gelu")
    model = nn.Sequential(layer, nn.Linear(64, 16)).eval()
    x = torch.randn(4, 20, 64) * torch.rand(4, 20, 1).mul(4).exp()  # tokens of very different size
    with torch.no_grad():
        reference = model(x)
        exported = export(model, (x,))
        for options in ({}, {"w_granularity": "per_channel"},
                        {"w_granularity": "per_channel", "act_granularity": "per_token"}):  # fmt: skip
            q_model = quantize(exported, DynamicQuantConfig(**options))
            print(f"{options or 'defaults'}: SQNR {sqnr(reference, q_model(x)):.1f} dB")
    print(q_model.report)


if __name__ == "__main__":
    main()
