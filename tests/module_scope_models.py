"""Models for the tests of module scope."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.quantization import StaticQuantConfig

CONFIG, FLOAT = StaticQuantConfig(), StaticQuantConfig(w_dtype="fp32")


def close(a: Tensor, b: Tensor, db: float = 30) -> bool:
    return bool(10 * torch.log10((a**2).sum() / ((a - b) ** 2).sum()) > db)


def modules(q: Any, where: str = "kernels") -> set[str]:
    return {line.module for line in getattr(q.report, where)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Several kinds of layers, nested, with a method of its own; few forms, for each form is captured once."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 16)

    def forward(self, ids: Tensor, depth: int = 2) -> Tensor:
        x = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        for i in range(depth):  # Python decides
            x = self.blocks[i](x)
        return self.head(x)

    def predict(self, ids: Tensor) -> list[int]:
        return self(ids)[:, -1].argmax(-1).tolist()


LAYERS = {"emb", "conv", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "head"}


def ids(*shape: int) -> Tensor:
    return torch.randint(20, shape or (4, 7))
