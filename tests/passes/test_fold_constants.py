"""Weights that the model computes of its parameters become weights; nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.export import export
from inc_graph.graph import Fuel, editing, get_tensor
from inc_graph.passmanager import Pipeline

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def fold(model: nn.Module, *args: Tensor) -> tuple[fx.GraphModule, list[str]]:
    """The folded graph, checked to compute the same bits, and the names of what was folded."""
    gm = export(model.eval(), args)
    want = gm(*args)
    result = Pipeline.parse("fold-constants").run(gm)
    assert torch.equal(result.graph(*args), want) and torch.equal(model(*args), want)
    return result.graph, result.reports[0].matched


def weights(gm: fx.GraphModule) -> list[fx.Node]:
    return [n.args[1] for n in gm.graph.nodes if n.target in (aten.linear.default, aten.conv2d.default)]  # type: ignore[misc]


class Packed(nn.Module):
    """One matrix for three projections."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        (a, b, c), (p, q, r) = self.weight.chunk(3), self.bias.chunk(3)
        return F.linear(x, a, p) + F.linear(x, b, q) * F.linear(x, c, r)


def test_projections_that_share_a_matrix() -> None:
    model = Packed()
    gm, matched = fold(model, torch.randn(3, 8))
    assert len(matched) == 6 and all(w.op == "get_attr" for w in weights(gm))
    assert next(get_tensor(gm, w).data_ptr() for w in weights(gm)) == model.weight.data_ptr()  # a view, not a copy
    assert not any(n.target is aten.split.Tensor for n in gm.graph.nodes) and "weight" not in gm._parameters


def test_parametrized_cast_and_reshaped_weights() -> None:
    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.bfloat16(), self.weight.to(torch.bfloat16), self.bias.to(torch.bfloat16))

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3, 2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel.permute(3, 2, 0, 1) / self.kernel.norm())

    norm = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    for model, x in ((Cast(8, 4), torch.randn(2, 8)), (Table(), torch.randn(1, 2, 5, 5)), (norm, torch.randn(2, 8))):
        gm, matched = fold(model, x)
        assert matched and [w.op for w in weights(gm)] == ["get_attr"], type(model)


def test_one_expression_is_computed_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight * 2
            return F.linear(F.linear(x, w), w) + w.sum()  # and one reader that is no layer

    gm, matched = fold(Twice(), torch.randn(2, 8))
    a, b = weights(gm)
    assert matched == ["mul", "mul"] and a.target == b.target
    assert any(n.target is aten.mul.Tensor for n in gm.graph.nodes)


def test_what_is_not_constant_stays() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("state", torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.w + x.mean())  # of the input
            y = F.linear(y, self.state * 2)  # of a buffer that is written to
            self.state.mul_(0.5)
            return y + (self.w * 3).sum()  # constant, but no weight

    gm = export(Model().eval(), torch.randn(2, 8))
    result = Pipeline.parse("fold-constants").run(gm)
    assert not result.reports[0].matched and all(w.op == "call_function" for w in weights(result.graph))

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w + torch.rand_like(self.w))

    assert not Pipeline.parse("fold-constants").run(export(Random().eval(), torch.randn(2, 4))).reports[0].matched


def test_fuel() -> None:
    gm: Any = export(Packed().eval(), torch.randn(3, 8))
    with editing(fuel=Fuel(2)):
        result = Pipeline.parse("fold-constants").run(gm)
    assert len(result.reports[0].matched) == 2
