"""How close is bfloat16, with and without a layer in float32, and how much smaller does the model get?

`python -m examples.half_precision`
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from inc_graph.quantization import MixedPrecisionConfig, convert
from inc_graph.report import attribute_bytes


def main() -> None:
    warnings.filterwarnings("ignore", module="copyreg")  # torch.export deprecates a class of its own
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 64)).eval()
    x = torch.randn(32, 256)

    everything = MixedPrecisionConfig(dtype="bf16")
    but_the_head = MixedPrecisionConfig(dtype="bf16").set_local("3", MixedPrecisionConfig(dtype="fp32"))
    with torch.no_grad():
        for name, config in (("everything", everything), ("but the head", but_the_head)):
            half = convert(model, config, example_inputs=(x,))
            error = (half(x) - model(x)).norm() / model(x).norm()
            print(f"{name}: error {error:.4f}, {attribute_bytes(half) / attribute_bytes(model):.2f} x the bytes")
            for line in half.report.floats:
                print(f"  {line.op} is float32: {line.detail.removeprefix('float32: ')}")


if __name__ == "__main__":
    main()
