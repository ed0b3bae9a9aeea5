"""Small models that hold what is hard to save, and how each is called."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import torch
from torch import nn

Pair = namedtuple("Pair", ["first", "second"])


class Net(nn.Module):
    """A convolution, a residual sum and a linear layer; nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = torch.relu(self.conv(x))
        y = torch.relu(self.again(y) + y)
        return {"logits": self.head(y.mean((2, 3))), "rest": (y[:1], [x.shape[0] * 2])}


class Counts(nn.Module):
    """Writes to a buffer, that another one may share memory with (torch.export takes no such model)."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("sums", torch.zeros(2, 4))
        self.register_buffer("first", self.sums[0] if shared else torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        self.sums.add_(y.sum(0).detach())
        return y + self.first


class Tied(nn.Module):
    """A table that is the output head, too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc(torch.relu(self.fc(self.table(ids))))))


class Odd(nn.Module):
    """Constants of many kinds: complex, boolean, expanded, transposed, empty, infinite, half."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("phase", torch.polar(torch.ones(6), torch.arange(6.0)))
        self.register_buffer("mask", torch.tensor([True, False] * 3))
        self.register_buffer("wide", torch.randn(1, 6).expand(4, 6))
        self.register_buffer("turned", torch.randn(6, 4).t())
        self.register_buffer("rounded", torch.randn(6, dtype=torch.bfloat16))
        self.register_buffer("scalar", torch.tensor(0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x).masked_fill(self.mask, float("-inf")).clamp(min=-3.0)
        z = torch.view_as_real(y * self.phase).sum(-1)
        return (z + self.wide + self.turned) * self.rounded.float() * self.scalar


class Outputs(nn.Module):
    """Keyword-only and optional inputs; a namedtuple and an ordered dictionary come out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, shift: Any = None, *, scale: torch.Tensor) -> Any:
        y = self.fc(x) * scale
        return Pair(y, OrderedDict(b=y + 1, a=[x]))


class Branch(nn.Module):
    """Control flow with graphs in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return torch.cond(y.sum() > 0, lambda v: torch.sin(v), lambda v: self.other(v), (y,))


class Sizes(nn.Module):
    """Sizes that depend on those of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.cat([self.fc(x), self.fc(y)], 1)
        return z.reshape(z.shape[0], -1)[:, : (x.shape[1] * 4) // 2] * (z.shape[1] % 3 + 1)


def _dynamic(*shapes: Any) -> Any:
    d = torch.export.Dim.DYNAMIC
    return tuple(dict.fromkeys(s, d) for s in shapes)


def cases() -> dict[str, tuple[nn.Module, Any, Any, list[Any]]]:
    """{name: (model, example inputs, dynamic shapes, more inputs)}."""
    torch.manual_seed(0)
    r = torch.randn
    return {
        "net": (Net(), (r(2, 3, 8, 8),), _dynamic([0]), [(r(5, 3, 8, 8),)]),
        "net, fixed": (Net(), (r(2, 3, 8, 8),), None, []),
        "channels last": (Net().to(memory_format=torch.channels_last), (r(2, 3, 8, 8),), None, []),
        "written buffers": (Counts(), (r(3, 4),), None, [(r(3, 4),), (r(3, 4),)]),
        "shared buffers": (Counts(True), (r(3, 4),), None, [(r(3, 4),)]),
        "tied": (Tied(), (torch.arange(6),), None, []),
        "odd constants": (Odd(), (r(4, 6),), None, []),
        "outputs": (Outputs(), {"x": r(2, 4), "scale": r(4)}, None, []),
        "branches": (Branch(), (r(3, 4),), None, [(-r(3, 4),)]),
        "sizes": (Sizes(), (r(2, 3, 4), r(2, 5, 4)), _dynamic([0, 1], [0, 1]), [(r(3, 7, 4), r(3, 2, 4))]),
    }
