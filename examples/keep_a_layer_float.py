"""Keep some layers in float: by module name, by class, by function, or the other way round with a white list.

`python -m examples.keep_a_layer_float`
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.quantization import QuantizedModel, StaticQuantConfig, convert, prepare


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def quantized(model: nn.Module, config: StaticQuantConfig) -> QuantizedModel:
    torch.manual_seed(0)
    data = [torch.rand(4, 3, 32, 32) for _ in range(4)]
    prepared = prepare(export(model, (data[0],)), config)
    for x in data:
        prepared(x)
    return convert(prepared)


def main() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    keep = StaticQuantConfig(w_dtype="fp32")  # a config whose operators stay float

    configs = {
        "everything": StaticQuantConfig(),
        "not the stem (by name, a regular expression)": StaticQuantConfig().set_local("stem", keep),
        "no linear layer (by class)": StaticQuantConfig().set_local(nn.Linear, keep),
        "no convolution but body.2 (a name beats a class)": StaticQuantConfig()
        .set_local(nn.Conv2d, keep)
        .set_local(r"body\.2", StaticQuantConfig()),
        "only the head (white list)": StaticQuantConfig(white_list=["head"]),
    }
    for title, config in configs.items():
        report = quantized(model, config).report
        print(f"{title}:")
        print("   int8 :", ", ".join(line.module for line in report.kernels))
        for line in report.floats:
            print(f"   float: {line.module or line.name}: {line.detail}")


if __name__ == "__main__":
    main()
