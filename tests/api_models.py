"""What the tests of the public functions quantize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.quantization import StaticQuantConfig, prepare

DYNAMIC = torch.export.Dim.DYNAMIC


class Net(nn.Module):
    """Linear, activation, matmul of two activations, add, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc10, self.fc2 = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y, z = torch.relu(self.fc1(x)), self.fc10(x)
        return self.fc2(torch.matmul(torch.matmul(y, z.transpose(-1, -2)), y) * scale)


def close(a: Tensor, b: Tensor, db: float = 25) -> bool:
    return bool(10 * torch.log10((a**2).sum() / ((a - b) ** 2).sum()) > db)


def calibrated(model: nn.Module, data: list[Tensor], config: Any = None, **options: Any) -> nn.Module:
    prepared = prepare(model, config or StaticQuantConfig(), example_inputs=data[0], **options)
    for x in data:
        prepared(x)
    return prepared


def kinds(q: Any) -> dict[str, str]:
    """Module path (operator for functions) -> where each linear and matmul ended."""
    found = {}
    for where in ("kernels", "reference", "floats"):
        found |= {x.module or x.name: where for x in getattr(q.report, where) if x.op in ("linear", "matmul")}
    return found


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, 8) for _ in range(4)]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
