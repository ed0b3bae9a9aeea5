"""What the tests name on the command line as `cli_models:...`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """Two layers, and an input that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        return y if scale is None else y * scale


def net() -> nn.Module:
    print("a line of the user's")
    torch.manual_seed(0)
    return Net().eval()


ready = net()


def positional() -> Iterator[Any]:
    torch.manual_seed(1)
    for _ in range(6):
        yield (torch.randn(4, 16),)


def named() -> list[Any]:
    return [{"x": x, "scale": torch.ones(8)} for (x,) in positional()]


def tensors() -> list[Any]:
    return [x for (x,) in positional()]


def single() -> list[Any]:
    return [torch.randn(1, 16)]


def wrong_shape() -> list[Any]:
    return [torch.randn(4, 16), torch.randn(4, 17)]


def nothing() -> list[Any]:
    return []


number = 3
