"""Small models for the tests of smoothing, and short ways to their smoothed graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.channel_stats import CALLS, Recalls
from inc_graph.graph import clone
from inc_graph.recipe import Recipe, Where, WhereRule, set_recipe
from inc_graph.smooth_report import Smoothed, smooth_lines
from inc_graph.smoothing import Smoothing
from tests.passes.pipelines import FLOAT, INT8, captured, run

PREPARE = f"{FLOAT},annotate,insert-observers,watch-channels"


HALF = Smoothing()


def plan(how: Smoothing = HALF, what: Any = INT8, *local: WhereRule) -> Recipe:
    """A recipe that quantizes everything and smooths it."""
    return Recipe("test", (WhereRule(Where(), replace(what, smooth=str(how))), *local), "", "", None, "eager")


def watched(model: nn.Module, *args: Any, recipe: Recipe | None = None, dynamic: Any = None) -> fx.GraphModule:
    """The graph with channel observers, which have seen the arguments."""
    gm = captured(model, *args, dynamic=dynamic)
    set_recipe(gm, recipe or plan())
    gm = run(gm, PREPARE).graph
    with torch.no_grad():
        gm(*args)
    return gm


def smoothed(gm: fx.GraphModule, *args: Any) -> tuple[fx.GraphModule, Smoothed]:
    """The smoothed, observed graph of a watched one, and its report. `args`: the tensors that it was called with."""
    work = clone(gm)
    work.meta[CALLS] = Recalls([list(args)])
    done = run(work, "smooth-quant").graph
    return done, smooth_lines(done)


def outliers(channels: int, seed: int = 0, large: float = 30.0) -> Tensor:
    """Factors of channels, some of them large: float32 [channels]."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(channels, generator=generator) + 0.5
    factors[torch.randperm(channels, generator=generator)[: max(1, channels // 8)]] *= large
    return factors


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(outliers(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Attention(nn.Module):
    """Grouped heads: `kv` heads of keys and values, repeated for `heads` heads of queries."""

    def __init__(self, size: int = 16, heads: int = 4, kv: int = 2) -> None:
        super().__init__()
        self.heads, self.kv, self.width = heads, kv, size // heads
        self.q, self.k, self.v = (
            nn.Linear(size, size),
            nn.Linear(size, kv * self.width),
            nn.Linear(size, kv * self.width),
        )
        self.o = nn.Linear(size, size)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.width).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x), self.heads), self.split(self.k(x), self.kv), self.split(self.v(x), self.kv)
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(x.shape))


class Written(Attention):
    """The same with attention written out, and heads repeated by an expanded view."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x), self.heads), self.split(self.k(x), self.kv), self.split(self.v(x), self.kv)
        k, v = (t[:, :, None].expand(-1, -1, self.heads // self.kv, -1, -1).reshape(q.shape) for t in (k, v))
        y = torch.matmul(torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1), v)
        return self.o(y.transpose(1, 2).reshape(x.shape))


class Packed(nn.Module):
    """Queries, keys and values from one layer, as views of its result."""

    def __init__(self, how: str, size: int = 16) -> None:
        super().__init__()
        self.how, self.qkv, self.o = how, nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        packed, (b, n, size) = self.qkv(x), x.shape
        if self.how == "heads":
            q, k, v = packed.reshape(b, n, 3, 4, size // 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = {
                "chunk": lambda: packed.chunk(3, -1),
                "split": lambda: packed.split(size, -1),
                "slice": lambda: [packed[..., i * size : (i + 1) * size] for i in range(3)],
            }[self.how]()
            q, k, v = (t.view(b, n, 4, size // 4).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, n, size))


class Gated(nn.Module):
    """RMSNorm, then up * silu(gate) -> down."""

    def __init__(self, size: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.norm, self.gate, self.up = RMSNorm(size), nn.Linear(size, inner, False), nn.Linear(size, inner, False)
        self.down = nn.Linear(inner, size, False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gated_with_outliers() -> nn.Module:
    """A norm that makes outliers, and layers with small weights for them, as trained models have."""
    torch.manual_seed(0)
    m = Gated().eval()
    m.norm.weight.data = outliers(8, large=60)
    for layer in (m.gate, m.up):
        layer.weight.data /= m.norm.weight
    return m
