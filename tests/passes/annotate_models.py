"""Models for the tests of annotate, and what it wrote on their graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.graph import peek_meta
from inc_graph.recipe import OpQuant, Recipe
from inc_graph.spec import PerChannel, QSpec
from tests.passes.pipelines import (
    S8,
    annotate,
)

aten = torch.ops.aten


SIGNED = OpQuant(S8, QSpec("int8", "symmetric", PerChannel(0)))


class Do(nn.Module):
    """Layers, and a function of them and the inputs."""

    def __init__(self, f: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.f = f
        for key, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(key, layer)
            else:
                setattr(self, key, layer)

    def forward(self, *args: Any) -> Any:
        return self.f(self, *args)


def annotated(f: Callable[..., Any], *args: Any, plan: Recipe | None = None, **layers: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    return annotate(Do(f, **layers), *args, plan=plan).graph


def quant(node: fx.Node) -> dict[str, Any]:
    return peek_meta(node).get("quant", {})


def groups(gm: fx.GraphModule) -> set[str]:
    return {q["group"] for n in gm.graph.nodes for q in quant(n).values()}


IMAGE, ROWS, SEQUENCE = torch.randn(2, 4, 6, 6), torch.randn(3, 4), torch.randn(2, 5, 4)


def layers(names: str, width: int = 4) -> dict[str, nn.Module]:
    return {n: nn.Linear(width, width) for n in names}
