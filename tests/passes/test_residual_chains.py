"""Chains of residual sums: int8 up to the last one, whatever reads the last one; and right in every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.graph import peek_meta
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from tests.golden_check import check_golden
from tests.passes.pipelines import annotate, find, recipe, text

KERNELS = ("conv2d", "linear", "add")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x))))


class Chain(nn.Module):
    """A stem, residual blocks with `between` them, a float end."""

    def __init__(self, depth: int, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.blocks, self.between = nn.ModuleList(Block() for _ in range(depth)), between

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = self.between(block(x))
        return self.head(x.mean([2, 3]))


class Skips(nn.Module):
    """Values that an int8 sum could overwrite, read in float afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = x + self.a(x)
        z = y + self.b(y)
        late = z + self.c(z)
        return (late + y) * z.flip(2) + x


def sqnr(want: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


def both(model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """One Q-DQ graph on oneDNN and on the reference."""
    prepared = prepare(model.eval(), StaticQuantConfig(), example_inputs=x, backend="inductor")
    for _ in range(3):
        prepared(torch.randn_like(x))
    return convert(prepared), convert(prepared, backend="eager")


def test_golden() -> None:
    torch.manual_seed(0)
    check_golden(
        "annotate/chain.txt", text(annotate(Chain(2), torch.randn(1, 3, 8, 8), plan=recipe(supported=KERNELS)))
    )


def test_all_sums_but_the_last_are_quantized() -> None:
    torch.manual_seed(0)
    model, x = Chain(6).eval(), torch.randn(2, 3, 16, 16)
    q, reference = both(model, x)
    report = q.report
    assert (report.count("conv2d"), report.count("add"), report.count("linear")) == (13, 5, 1)
    assert [(line.op, line.module) for line in report.floats] == [
        ("add", "blocks.5"), ("relu", "blocks.5"), ("avg_pool", "")
    ]  # fmt: skip
    for _ in range(3):
        x = torch.randn_like(x)
        want, got = model(x), q(x)
        assert sqnr(want, got) > 25 and sqnr(reference(x), got) > 30
        assert torch.equal(got, q(x))  # nothing of the model's own was written to


def test_the_float_sum_reads_codes() -> None:
    """What it reads is rounded once, for both readers, so that the sum before it can write codes."""
    gm = annotate(Chain(3), torch.randn(1, 3, 8, 8), plan=recipe(supported=KERNELS)).graph
    *sums, last = find(gm, "add")
    assert all("rule" in peek_meta(n) for n in sums)
    (read,) = peek_meta(last)["reads"]
    assert read == sums[-1].next.name and "float" in peek_meta(last) and "rule" not in peek_meta(last)


@pytest.mark.parametrize("move", [lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 1).flip(2)])
def test_blocks_with_moves_between_them(move: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Chain(3, move).eval(), torch.randn(2, 3, 18, 18)
    q, reference = both(model, x)
    assert q.report.count("add") == 2
    assert sqnr(model(x), q(x)) > 25 and sqnr(reference(x), q(x)) > 30


def test_no_sum_overwrites_what_is_read_in_float_later() -> None:
    torch.manual_seed(0)
    model, x = Skips().eval(), torch.randn(2, 3, 12, 12)
    q, reference = both(model, x)
    assert q.report.count("add") == 2
    for _ in range(3):
        x = torch.randn_like(x)
        assert sqnr(model(x), q(x)) > 25 and sqnr(reference(x), q(x)) > 35


@pytest.mark.parametrize(
    ("f", "quantized"),
    [
        (lambda m, y, x: m.b(y) + (y + x), True),
        (lambda m, y, x: m.b(y) + (y * x), True),
        (lambda m, y, x: m.b(y) + (y.flip(0).relu() + x), True),  # a move and an activation on the way
        (lambda m, y, x: m.b(y) + (torch.softmax(y, 1) + x), False),
        (lambda m, y, x: m.b(y) + (y.flip(0) + x) + torch.softmax(y.flip(0), 1), False),
        (lambda m, y, x: m.b(y) + F.avg_pool2d(y, 1) + x, False),
        (lambda m, y, x: m.b(y) + (y * 2 + x), False),  # a number is no second tensor
        (lambda m, y, x: (m.b(y) + x, y), False),
        (lambda m, y, x: (y + x) * x, False),  # nobody reads codes
    ],
)
def test_who_may_read_a_sum_in_float(f: Callable[..., Any], quantized: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return f(self, self.a(x) + x, x)

    gm = annotate(Net(), torch.randn(2, 4, 6, 6), plan=recipe(supported=KERNELS)).graph
    assert ("rule" in peek_meta(find(gm, "add")[0])) is quantized


def test_a_pre_norm_transformer_keeps_its_sums_in_float() -> None:
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2)
    gm = annotate(layers, torch.randn(2, 5, 8), plan=recipe(supported=KERNELS)).graph
    assert len(find(gm, "add")) == 4 and not any("rule" in peek_meta(n) for n in find(gm, "add"))
