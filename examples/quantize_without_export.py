"""A model that torch.export cannot capture is quantized layer by layer and keeps its class, methods and control flow.

`python -m examples.quantize_without_export`
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from inc_graph.errors import IncWarning
from inc_graph.quantization import StaticQuantConfig, convert, prepare


class Settler(nn.Module):
    """Applies a block until its output settles: how often depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh())
        self.head = nn.Linear(32, 4)
        self.rare = nn.Linear(32, 32)

    def settle(self, x: Tensor) -> tuple[Tensor, int]:
        steps = 0
        while steps < 20:
            new = 0.5 * x + 0.5 * self.block(x)
            steps += 1
            if (new - x).abs().max() < 0.05:
                return new, steps
            x = new
        return self.rare(x), steps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.settle(x)[0])


def main() -> None:
    torch.manual_seed(0)
    model = Settler().eval()
    data = [torch.randn(8, 32) for _ in range(8)]
    reference = model(data[0])

    # Without example inputs there is nothing to export. With them, export is tried first, and its failure is a warning
    # that carries torch.export's reason.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", IncWarning)
        prepared = prepare(model, StaticQuantConfig(), inplace=False, example_inputs=(data[0],))
    print("warning:", str(next(w.message for w in caught if issubclass(w.category, IncWarning))).splitlines()[0][:150])

    with torch.no_grad():
        for x in data:
            prepared(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", IncWarning)
        quantized = convert(prepared)
    for w in caught:
        if issubclass(w.category, IncWarning):
            print("warning:", w.message)

    noise = (quantized(data[0]) - reference).square().sum()
    print(f"still a {type(quantized).__name__}, whose settle() takes {quantized.settle(data[0])[1]} steps")
    print(f"SQNR {10 * torch.log10(reference.square().sum() / noise):.1f} dB")
    print(quantized.report)


if __name__ == "__main__":
    main()
