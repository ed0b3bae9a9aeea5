"""What the tests of the strategy by sensitivity tune."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig
from inc_graph.quantization.sensitivity import Measured, measure

FLOAT = StaticQuantConfig(w_dtype="fp32")


TENSOR = StaticQuantConfig(w_granularity="per_tensor", bias_correction=False, reduce_range=False)


PLAIN = StaticQuantConfig(bias_correction=False, reduce_range=False)


def mlp(widths: list[int], seed: int = 0) -> nn.Sequential:
    """Every layer is followed by a ReLU, and most weights are positive, so that no output dies."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layer = nn.Linear(a, b)
        layer.weight.data = torch.rand(b, a) - 0.3
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def data(width: int, rows: int = 32) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(1))


def feed(x: Tensor) -> Callable[[nn.Module], None]:
    return lambda prepared: prepared(x)


def damages(model: nn.Module, config: Any, x: Tensor, graph: bool, **kwargs: Any) -> Measured:
    return measure(export(model, (x,)) if graph else model, config, feed(x), (), **kwargs)


def crush_weights(model: nn.Sequential, at: int) -> None:
    """One row of layer `at` is enormous, and without effect: its sums are negative, and ReLU makes them 0."""
    model[2 * at].weight.data[0] = -1000.0
    model[2 * at].bias.data[0] = 0.0
