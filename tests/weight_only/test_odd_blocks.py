"""Blocks that a rounding block by block could get wrong: branches, experts, writes in place, keywords, reused memory,
heads that read more than the last block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import CalibrationError
from inc_graph.quantization import GPTQConfig, convert, prepare, quantize
from inc_graph.quantization import block_by_block as module
from inc_graph.quantization.layer_groups import Group
from inc_graph.quantization.leaf import Leaf

WIDTH = 16
Rows = dict[str, int]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(torch.relu(self.a(x)))


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.c(torch.relu(self.a(x)))
        return x


class Branching(Block):
    """Long calls go through `b` as well."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if len(x) > 5:
            h = self.b(h)
        return x + self.c(h)


class Experts(Block):
    """Each row goes through one of two layers."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        y = torch.zeros_like(x)
        if bool(first.any()):
            y[first] = self.a(x[first]).to(y.dtype)
        if not bool(first.all()):
            y[~first] = self.b(x[~first]).to(y.dtype)
        return x + self.c(y)


class Exact(Block):
    """Cannot run under autocast: `index_put` wants one dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y, keep = torch.zeros_like(x), x[..., 0] > 0
        y[keep] = self.c(self.a(x))[keep]
        return x + y


def net(kind: Callable[[], nn.Module], count: int = 2, *behind: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(*(kind() for _ in range(count))), *behind).eval()


def config(**options: Any) -> GPTQConfig:
    return GPTQConfig(bits=4, group_size=16, **options)


def data(*rows: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, WIDTH) for n in rows]


def run(batches: list[Tensor]) -> Callable[[nn.Module], None]:
    def through(model: nn.Module) -> None:
        for x in batches:
            model(x)

    return through


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Rows of inputs that each layer was rounded against."""
    found: Rows = {}
    own = Group.fill

    def fill(self: Group, leaf: Leaf) -> None:
        own(self, leaf)
        found[leaf.path] = self.rows

    monkeypatch.setattr(Group, "fill", fill)
    return found


@pytest.fixture(params=["in lockstep", "twice"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "twice":
        monkeypatch.setattr(module, "LOCKSTEP_BYTES", -1)
    return str(request.param)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = weights(a), weights(b)
    return bool(x) and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_a_block_may_write_to_its_input(way: str) -> None:
    batches = data(32, 32)
    plain, odd = (quantize(net(kind, 3), config(), run(batches)) for kind in (Block, InPlace))
    unused = {f"0.{i}.b" for i in range(3)}
    assert same(plain, odd) and not unused & {line.name for line in odd.report.weights}
    assert torch.equal(batches[0], data(32, 32)[0]), "what the user holds is not written to"


def test_the_memory_of_a_batch_may_be_used_again(way: str) -> None:
    fresh, again = net(Block), net(Block)
    one, two = prepare(fresh, config()), prepare(again, config())
    memory = torch.empty(32, WIDTH)
    for x in data(32, 32, 32):
        one(x)
        two(memory.copy_(x))
    memory.zero_()
    assert same(convert(one), convert(two))


def test_calls_need_not_take_the_same_way_through_a_block(way: str, rows: Rows) -> None:
    quantize(net(Branching), config(), run(data(40, 4, 4, 40)))
    assert rows == {f"0.{i}.{name}": n for i in range(2) for name, n in (("a", 88), ("b", 80), ("c", 88))}


def test_nor_need_the_first_call_go_through_all_layers(way: str, rows: Rows) -> None:
    model = quantize(net(Branching), config(), run(data(4, 40, 40)))
    assert rows == {f"0.{i}.{name}": n for i in range(2) for name, n in (("a", 84), ("b", 80), ("c", 84))}
    assert len(model.report.weights) == 6


def test_a_branch_in_the_last_block_alone(rows: Rows) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(Branching() for _ in range(2)))).eval()
    kept = Branching.forward
    model[0][0].forward = lambda x: kept(model[0][0], torch.cat([x, x]))[: len(x)]  # always long enough
    quantize(model, config(), run(data(10, 3, 3)))
    assert rows["0.1.a"] == 16 and rows["0.1.b"] == 10 and rows["0.1.c"] == 16


def test_experts(way: str, rows: Rows) -> None:
    batches = data(40, 40, 40)
    positive = sum(int((x[:, 0] > 0).sum()) for x in batches)
    quantize(net(Experts), config(), run(batches))
    assert rows["0.0.a"] == positive and rows["0.0.b"] == 120 - positive and rows["0.0.c"] == rows["0.1.c"] == 120


def test_a_block_that_autocast_breaks_runs_in_float(way: str) -> None:
    lines = quantize(net(Exact), config(), run(data(64, 64))).report.weights
    assert len(lines) == 4 and all(line.error < line.rounded for line in lines)


class ByKeyword(Block):
    def forward(self, mask: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * mask


class KeywordOnly(Block):
    def forward(self, *, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [ByKeyword, KeywordOnly])
def test_blocks_called_by_keyword(kind: type[Block], rows: Rows) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(kind() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x=x) if kind is KeywordOnly else block(x=x, mask=torch.ones(1))
            return x

    quantize(Model().eval(), config(), run(data(20, 20)))
    assert rows["blocks.1.c"] == 40


def test_a_layer_called_by_keyword(rows: Rows) -> None:
    class Named(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.c(input=torch.relu(self.a(x)))

    quantize(net(Named), config(), run(data(20)))
    assert rows["0.1.c"] == 20


def test_a_head_may_read_every_block() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(3 * WIDTH, 4)

        def features(self, x: Tensor) -> Tensor:
            found = []
            for block in self.blocks:
                x = block(x)
                found.append(x)
            return torch.cat(found, -1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x))

    torch.manual_seed(0)
    model, batches = Features().eval(), data(64, 64)
    prepared = prepare(model, config())
    run(batches)(prepared)
    seen: list[Tensor] = []
    own = module.run_tail

    def recorded(*args: Any) -> None:
        own(*args)
        (observer,) = (o for leaf, paths in args[3].items() if paths == ["head"] for o in module.grams(leaf))
        seen.append(observer.total.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_tail", recorded)
        converted = convert(prepared)
    with torch.no_grad():
        x = torch.cat([converted.features(batch) for batch in batches])
    want = x.T @ x
    (got,) = seen
    assert float((got - want * (got.trace() / want.trace())).norm() / got.norm()) < 0.05


def test_torchs_own_encoder_with_a_head() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 4)).eval()
    quantized = quantize(model, config(), lambda m: m(torch.randn(16, 10, WIDTH)))
    assert {"0.layers.1.linear2", "1"} <= {line.name for line in quantized.report.weights}


def test_a_batch_with_nan_is_refused_and_leaves_no_trace() -> None:
    one, two = prepare(net(Block), config()), prepare(net(Block), config())
    good = data(32, 32)
    bad = good[0].clone()
    bad[3, 3] = float("nan")
    one(good[0])
    with pytest.raises(CalibrationError, match="batch 2: 1 NaN and 0 infinite values"):
        one(bad)
    one(good[1])
    run(good)(two)
    assert same(convert(one), convert(two))
