"""Models whose layers are rounded in sequence, and what is measured of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from inc_graph import in_sequence
from inc_graph.errors import IncWarning
from inc_graph.quantization import (
    GPTQConfig,
    block_by_block,
    convert,
    prepare,
)
from inc_graph.side_by_side import SideBySide
from inc_graph.weights import Gram

WIDTH = 32


ROWS = {"x": {0: Dim("rows", min=2)}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.tanh(self.q(h)) * self.k(h))


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def made(cls: Any = Net, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(**kwargs).eval()


def data(n: int = 4, rows: int = 24) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(rows + i, WIDTH, generator=g) for i in range(n)]


def prepared_graph(model: nn.Module, config: Any = None, batches: list[Tensor] | None = None) -> Any:
    config = config or GPTQConfig(group_size=16, bits=3)
    prepared = prepare(model, config, example_inputs=(torch.zeros(8, WIDTH),), dynamic_shapes=ROWS)
    for x in batches or []:
        prepared(x)
    return prepared


def quietly(prepared: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncWarning)  # few rows
        return convert(prepared, **kwargs)


def error(q: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((q(x) - model(x)).norm() / model(x).norm())


def products(model: nn.Module, path: str, batches: list[Tensor]) -> Tensor:
    """sum x x^T of what the layer at `path` reads, computed without any of the library's code."""
    rows: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for x in batches:
            model(x)
    hook.remove()
    x = torch.cat(rows).double()
    return (x.T @ x).float()


def float_weights(q: Any) -> dict[str, Tensor]:
    """{path: values of the rounded weight} of a converted graph, by running the reference on unit vectors."""
    found = {}
    gm = q.graph
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            run = SideBySide(gm, [[torch.zeros(2, WIDTH)]], [node.args[1]])
            path = list(node.meta["nn_module_stack"].values())[-1][0]
            found[path.removeprefix("L['self'].")] = run.to(node.args[1])[0]
    return found


@pytest.fixture(params=["float32", "fast"])
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What the machine is said to be fast at."""
    dtype = torch.float32 if request.param == "float32" else torch.bfloat16
    for module in (in_sequence, block_by_block):
        monkeypatch.setattr(module, "fast_dtype", lambda: dtype)
    return dtype


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[Gram]:
    """Of each layer in the order in which they are rounded."""
    from inc_graph.passes.qparams.gptq import GPTQ

    seen: list[Gram] = []
    solve = GPTQ.solve

    def watched(self: Any, weight: Tensor, spec: Any, gram: Gram | None = None) -> Any:
        assert gram is not None
        seen.append(gram)
        return solve(self, weight, spec, gram)

    monkeypatch.setattr(GPTQ, "solve", watched)
    return seen
