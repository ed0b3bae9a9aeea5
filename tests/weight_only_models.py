"""Small models whose weights alone are quantized, in every form that weights have, for the tests of such models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inc_graph.numerics import choose_qparams, quantize
from inc_graph.quantization import RTNConfig
from inc_graph.quantization import quantize as quantize_model
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import PerGroup, QSpec
from inc_graph.weights import Codes, Gram, WeightAlgorithm

CONFIGS: dict[str, RTNConfig] = {
    "int4": RTNConfig(group_size=16),
    "uint4": RTNConfig(group_size=16, use_sym=False),
    "uint3": RTNConfig(bits=3, group_size=24, use_sym=False),
    "int8": RTNConfig(bits=8, group_size=-1),
    "nf4": RTNConfig(dtype="nf4", group_size=16),
    "fp8": RTNConfig(dtype="fp8_e4m3"),
    "fp8_e5m2": RTNConfig(dtype="fp8_e5m2", group_size=16),
    "double": RTNConfig(group_size=16, use_double_quant=True, double_quant_use_sym=False),
    "columns": RTNConfig(group_size=16, group_dim=0),
}
SCOPES = ["layers", "graph"]


class Block(nn.Module):
    """Norm, attention with angles made of positions, and a residual sum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.q_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.register_buffer("rates", torch.tensor([1.0, 0.5, 0.25, 0.125]).repeat(dim // 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        angles = torch.arange(x.shape[1], device=x.device)[:, None].to(torch.float32) * self.rates
        q = self.q_proj(y) * angles.cos().to(x.dtype)
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        return x + torch.softmax(q @ y.transpose(1, 2) + mask, -1) @ self.v_proj(y)


class Words(nn.Module):
    """A language model without caches: indices [n, t] -> [n, t, words]."""

    def __init__(self, dim: int = 32, words: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(words, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.head = nn.Linear(dim, words)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def ids(tokens: int = 7) -> Tensor:
    return torch.arange(3 * tokens).reshape(3, tokens) % 24


def quantized(scope: str, config: Any = None, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """`Words` with its weights quantized, as graph or layer by layer."""
    model = Words().eval() if model is None else model
    given = {"example_inputs": (ids(),)} if scope == "graph" else {}
    return quantize_model(copy.deepcopy(model), config or CONFIGS["int4"], **given, **options)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# ------------------------------------------------------------------------------------- what no config asks for as yet
@dataclass(frozen=True)
class Everything(WeightAlgorithm):
    """Input channels in another order, real zero points, and scales that are codes themselves, in another shape."""

    name: ClassVar[str] = "everything"

    def solve(self, weight: Tensor, spec: QSpec, gram: Gram | None = None) -> Codes:
        order = torch.arange(weight.shape[1]).flip(0)
        shuffled, block = weight.detach()[:, order].float(), spec.block(2)
        scale, zero = choose_qparams(shuffled, block, spec.qtype, "asymmetric")
        of_scale = QSpec("uint8", "asymmetric", PerGroup(64))
        row = scale.reshape(1, -1)
        scale2, zero2 = choose_qparams(row, of_scale.block(2), "uint8", "asymmetric")
        coded = Codes(quantize(row, scale2, zero2, of_scale.block(2), "uint8"), scale2, zero2, of_scale)
        real = zero.float() + 0.25
        used = coded.values().reshape(scale.shape)
        return Codes(quantize(shuffled, used, real, block, spec.qtype), coded, real, spec, order=order)


@contextmanager
def everything(monkeypatch: Any) -> Iterator[RTNConfig]:
    """A config whose algorithm is `Everything`."""
    ALGORITHMS.add("everything", Everything)
    monkeypatch.setattr(RTNConfig, "algorithm", lambda self: "everything")
    try:
        yield RTNConfig(group_size=16, use_sym=False)
    finally:
        ALGORITHMS.remove("everything")
