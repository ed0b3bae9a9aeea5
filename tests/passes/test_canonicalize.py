"""Identities go, products with constants become linear layers, and what is more than an identity stays."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph import graph as g
from inc_graph.text import to_text
from tests.golden_check import check_golden
from tests.passes.pipelines import bits, calls, captured, find_one, run, text

aten = torch.ops.aten
Function = Callable[["Weights", Tensor], Tensor]


class Weights(nn.Module):
    """Some constants, and a function of them and the input."""

    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.tied = self.w
        self.b = nn.Parameter(torch.randn(4, generator=generator))
        self.register_buffer("state", torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def canonical(f: Function, *shape: int) -> tuple[list[str], str]:
    """(operators after the pass, its report); checks that nothing else changed."""
    torch.manual_seed(0)
    model, x = Weights(f).eval(), torch.randn(*shape)
    unchanged = bits(model)
    with torch.no_grad():
        want = model(x)
        gm = captured(model, x)
        result = run(gm, "canonicalize")
        torch.testing.assert_close(result.graph(x), want, rtol=1e-5, atol=1e-5)
    assert unchanged()
    before = to_text(gm)
    again = run(gm, "canonicalize").reports[0]
    assert not again.matched and to_text(gm) == before
    return calls(gm), str(result.reports[0])


class Positive(nn.Module):
    """Something of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Parameter(torch.zeros(4, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.pad(x, (1, 1)), 0.5, self.training)
        x = self.conv(x).clone().float()
        x = x * torch.sigmoid(x)
        x = x.mean((2, 3)) @ self.mix
        return torch.addmm(self.bias, x, self.mix.t()).clamp_min(0)


class Rejected(nn.Module):
    """Each line looks like one of the rewrites and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("state", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.conv(F.pad(x, (0, 1, 0, 1)))
        b = self.conv(F.pad(x, (1, 1, 1, 1), value=2.0))
        c = a.transpose(2, 3).contiguous().view(a.shape[0], -1)
        d = a.mean((2, 3)) @ self.state
        self.state.add_(1)
        e = torch.addmm(d, d, d.t() @ d, alpha=2)
        return c.clone(), e + b.mean((2, 3)).double()


def test_golden() -> None:
    torch.manual_seed(0)
    check_golden("canonicalize/positive.txt", text(run(captured(Positive(), torch.randn(2, 3, 6, 6)), "canonicalize")))


def test_golden_rejected() -> None:
    torch.manual_seed(0)
    check_golden("canonicalize/rejected.txt", text(run(captured(Rejected(), torch.randn(2, 3, 6, 6)), "canonicalize")))


@pytest.mark.parametrize(
    ("f", "shape", "left"),
    [
        (lambda m, x: x.clone() + 1, (2, 4), ["add"]),
        (lambda m, x: x.contiguous().float().to(torch.float32).type_as(m.w) + 1, (2, 4), ["add"]),
        (lambda m, x: F.dropout(x, 0.5, False) + 1, (2, 4), ["add"]),
        (lambda m, x: nn.Identity()(x) + 1, (2, 4), ["add"]),
        (lambda m, x: x.transpose(0, 1).clone() + 1, (2, 4), ["transpose", "add"]),  # keeps strides: nothing moves
        (lambda m, x: x.clamp_max(1), (2, 4), ["clamp"]),
        (lambda m, x: torch.constant_pad_nd(x, [1, 1]), (2, 4), ["pad"]),
    ],
)
def test_identities_and_spellings(f: Function, shape: tuple[int, ...], left: list[str]) -> None:
    assert canonical(f, *shape)[0] == left


@pytest.mark.parametrize(
    ("f", "shape", "left"),
    [
        (lambda m, x: x.clone(), (2, 4), ["clone"]),  # else the caller would get his own input back
        (lambda m, x: x.clone().view(-1), (2, 4), ["clone", "view"]),
        (lambda m, x: x.double(), (2, 4), ["_to_copy"]),
        (lambda m, x: x.transpose(0, 1).contiguous().view(-1) * 2, (2, 4), ["transpose", "clone", "view", "mul"]),
        (lambda m, x: x.reshape(4, 2).t().reshape(8) * 2, (2, 4), ["view", "t", "clone", "_unsafe_view", "mul"]),
    ],
)
def test_copies_that_mean_something_stay(f: Function, shape: tuple[int, ...], left: list[str]) -> None:
    assert canonical(f, *shape)[0] == left


def test_a_buffer_read_before_it_is_written_stays_a_copy() -> None:
    def f(m: Weights, x: Tensor) -> Tensor:
        old = m.state.clone()
        m.state.add_(x)
        return x + old

    torch.manual_seed(0)
    x = torch.randn(4, 4)
    with torch.no_grad():
        model = Weights(f)
        want = [model(x), model(x)]
        gm = run(captured(Weights(f), x), "canonicalize").graph
        assert torch.equal(gm(x), want[0]) and torch.equal(gm(x), want[1])


@pytest.mark.parametrize("target", [aten.dropout.default, aten.alpha_dropout.default, aten.native_dropout.default])
@pytest.mark.parametrize(("p", "train", "goes"), [(0.5, False, True), (0.0, True, True), (0.5, True, False)])
def test_dropout(target: Any, p: float, train: bool, goes: bool) -> None:
    """The exporter of this torch leaves no dropout in an inference graph; others do."""
    gm = captured(Weights(lambda m, x: x + 1), torch.randn(2, 4))
    add = find_one(gm, "add")
    node = g.insert_call(gm, target, (add.args[0], p, train), before=add)
    if target is aten.native_dropout.default:
        node = g.insert_call(gm, operator.getitem, (node, 0), before=add)
    g.replace_uses(add.args[0], node, only=[add])
    report = run(gm, "canonicalize").reports[0]
    assert (calls(gm) == ["add"]) is goes
    assert ("the dropout is in training mode" in str(report)) is not goes


# ---------------------------------------------------------------------------------------------------------- products
@pytest.mark.parametrize(
    ("f", "shape"),
    [
        (lambda m, x: x @ m.w, (2, 4)),
        (lambda m, x: x @ m.w, (2, 3, 4)),
        (lambda m, x: torch.mm(x, m.w), (2, 4)),
        (lambda m, x: x @ m.w.t(), (2, 4)),
        (lambda m, x: x @ m.w.T, (2, 3, 4)),
        (lambda m, x: x @ m.w.mT, (2, 4)),
        (lambda m, x: x @ m.w.permute(-1, 0), (2, 4)),
        (lambda m, x: torch.addmm(m.b, x, m.w), (2, 4)),
        (lambda m, x: torch.addmm(m.b, x, m.w.t()), (2, 4)),
    ],
)
def test_a_product_with_a_constant_is_a_linear_layer(f: Function, shape: tuple[int, ...]) -> None:
    assert canonical(f, *shape)[0] == ["linear"]


@pytest.mark.parametrize(
    ("f", "shape", "reason"),
    [
        (lambda m, x: x @ x.t(), (2, 4), "both factors are activations"),
        (lambda m, x: x @ m.w[0], (2, 4), "both factors are activations"),
        (lambda m, x: x @ m.b, (2, 4), "the constant factor is not a float matrix"),
        (lambda m, x: (m.w.t() @ m.w) + x, (4, 4), "both factors are constants"),
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), (2, 4), "addmm with alpha or beta"),
        (lambda m, x: torch.addmm(m.b[:1], x, m.w), (2, 4), "the addend is not a bias vector"),
        (lambda m, x: torch.addmm(x, x, m.w), (2, 4), "the addend is not a bias vector"),
        (lambda m, x: (x @ m.state) + m.state.add_(1)[:2], (2, 4), "the matrix is a buffer that the model writes to"),
    ],
)
def test_other_products_stay(f: Function, shape: tuple[int, ...], reason: str) -> None:
    model, x = Weights(f).eval(), torch.randn(*shape)
    gm = captured(model, x)
    result = run(gm, "canonicalize")
    assert "linear" not in calls(gm) and reason in str(result.reports[0])


def test_one_matrix_is_transposed_once() -> None:
    gm = captured(Weights(lambda m, x: (x @ m.w) @ m.tied), torch.randn(2, 4))
    run(gm, "canonicalize")
    assert calls(gm) == ["linear", "linear"]
    assert len({n.target for n in gm.graph.find_nodes(op="get_attr")}) == 1


def test_a_transposed_read_shares_the_users_tensor() -> None:
    model = Weights(lambda m, x: x @ m.w.t())
    gm = captured(model, torch.randn(2, 4))
    run(gm, "canonicalize")
    assert g.get_tensor(gm, find_one(gm, "linear").args[1]) is model.w


# ----------------------------------------------------------------------------------------------------------- padding
@pytest.mark.parametrize(
    ("dims", "pad", "padding", "folded"),
    [
        (1, (2, 2), 1, [3]),
        (2, (1, 1, 2, 2), (0, 3), [2, 4]),
        (2, (1, 1), 0, [0, 1]),
        (3, (1, 1, 0, 0, 2, 2), 0, [2, 0, 1]),
        (2, (1, 1, 2, 2, 0, 0), 0, [2, 1]),
        (2, (0, 1, 2, 2), 0, None),
        (2, (-1, -1), 0, None),
        (2, (1, 1, 1, 1, 1, 1), 0, None),
    ],
)
def test_padding(dims: int, pad: tuple[int, ...], padding: int, folded: list[int] | None) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = 2 + 2 * (len(pad) > 2 * dims and pad[4])
            self.conv = getattr(nn, f"Conv{dims}d")(channels, 3, 2, padding=padding)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x, pad))

    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 2, *[5] * dims)
    gm = captured(model, x)
    result = run(gm, "canonicalize")
    torch.testing.assert_close(gm(x), model(x))
    if folded is None:
        assert "pad" in calls(gm) and "differs from side to side" in str(result.reports[0])
    else:
        assert calls(gm) == [f"conv{dims}d"] and find_one(gm, f"conv{dims}d").args[4] == folded


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_stays(mode: str) -> None:
    model = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    gm = captured(model, torch.randn(1, 2, 5, 5))
    assert "is not with zeros" in str(run(gm, "canonicalize").reports[0]) and "pad" in calls(gm)


# ------------------------------------------------------------------------------------------------------- activations
@pytest.mark.parametrize(
    ("f", "op"),
    [
        (lambda m, x: x * x.sigmoid(), "silu"),
        (lambda m, x: torch.sigmoid(x) * x, "silu"),
        (lambda m, x: x * F.relu6(x + 3) / 6, "hardswish"),
        (lambda m, x: x * (F.relu6(x + 3) / 6), "hardswish"),
        (lambda m, x: x * F.hardtanh(x + 3, 0.0, 6.0) / 6, "hardswish"),
        (lambda m, x: F.hardsigmoid(x) * x, "hardswish"),
    ],
)
def test_written_out_activations(f: Function, op: str) -> None:
    assert canonical(f, 3, 4)[0] == [op]


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: x * (x + 1).sigmoid(),
        lambda m, x: x * F.relu6(x + 2) / 6,
        lambda m, x: x * F.relu6(torch.add(x, 3, alpha=2)) / 6,
        lambda m, x: x * F.relu6(x + 3) / 5,
        lambda m, x: x * F.hardtanh(x + 3, 0.0, 5.0) / 6,
        lambda m, x: m.w * x.sigmoid(),
    ],
)
def test_near_activations_stay(f: Function) -> None:
    ops = canonical(f, 4, 4)[0]
    assert "silu" not in ops and "hardswish" not in ops


@pytest.mark.parametrize(("fuel", "left"), [(0, ["matmul", "sigmoid", "mul"]), (1, ["linear", "sigmoid", "mul"])])
def test_fuel(monkeypatch: pytest.MonkeyPatch, fuel: int, left: list[str]) -> None:
    """Each rewrite takes one unit, so that a miscompile can be bisected."""
    gm = captured(Weights(lambda m, x: (y := x @ m.w) * y.sigmoid()), torch.randn(2, 4))
    monkeypatch.setenv("INC_FUEL", str(fuel))
    run(gm, "canonicalize")
    assert calls(gm) == left
