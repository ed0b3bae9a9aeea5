"""What 4 bits cost after training, and what two more epochs of training with them bring back.

`python -m examples.train_with_quantization`
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from inc_graph.quantization import convert, freeze_observers, prepare_qat


def spirals(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of five spiral arms in 40 dimensions, and the arm that each is on."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(0, 5, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 1.2566 * arm + 4 * radius
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    lifted = points @ torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    return lifted + 0.05 * torch.randn(count, 40, generator=generator), arm


def train(model: nn.Module, epochs: int, rate: float) -> None:
    x, y = spirals(4096, 1)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    x, y = spirals(2000, 2)
    return 100 * float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    train(model, 30, 3e-3)
    print(f"float                       {accuracy(model.eval()):.1f} %")

    for name in ("MXFP4", "INT4"):
        # Scales of MXFP4 are found as the model runs; INT4 has ranges of activations, which one pass over data finds.
        untrained = prepare_qat(copy.deepcopy(model).train(), {nn.Linear: name})
        with torch.no_grad():
            untrained(spirals(1024, 1)[0])
        print(f"{name}, as it is             {accuracy(convert(untrained)):.1f} %")

        trained = prepare_qat(copy.deepcopy(model).train(), {nn.Linear: name})  # the model itself, under its own names
        train(trained, 2, 1e-3)
        freeze_observers(trained)  # the last epoch sees the ranges that will be used
        train(trained, 1, 3e-4)
        fake = trained.eval()(spirals(2000, 2)[0]).detach()
        quantized = convert(trained)
        print(f"{name}, trained with it      {accuracy(quantized):.1f} %")
        print(f"    converted and trained differ by {(quantized(spirals(2000, 2)[0]) - fake).abs().max():.1e}")
    print(quantized.report)


if __name__ == "__main__":
    main()
