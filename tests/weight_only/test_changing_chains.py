"""Calibration calls that do not run through the blocks of a model as the first one did: no layer is rounded against
products of inputs that it does not have."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.errors import CalibrationError
from inc_graph.quantization import GPTQConfig, block_by_block, convert, prepare
from inc_graph.quantization.block_inputs import block_inputs_of
from inc_graph.weights import Gram

WIDTH, IN_FLOAT = 16, "in the float model, not block by block"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        self.calls += 1
        h = torch.relu(self.a(x))
        return x + self.b(h if mask is None else h * mask)


class Model(nn.Module):
    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(self.block() for _ in range(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        self.calls += 1
        return self.head(self.between(self.inp(x), *args))

    def between(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Windows(Model):
    """Masks that differ from block to block where a call is long."""

    def between(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            mask = torch.ones(len(x), 1)
            mask[20 if i % 2 else len(x) :] = 0
            x = layer(x, mask=mask)
        return x


class Passes(Model):
    def between(self, x: Tensor, n: int = 1) -> Tensor:
        for _ in range(n):
            for layer in self.layers:
                x = layer(x)
        return x


class Early(Model):
    """Ends early for some inputs, which is known before the first block."""

    def between(self, x: Tensor) -> Tensor:
        short = len(x) > 20
        for layer in self.layers[: 2 if short else 3]:
            x = layer(x)
        return x


class Confident(Model):
    """Ends early for some inputs, which depends on what a block gives."""

    def between(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.abs().mean() > 2:
                break
        return x


class SkipsFirst(Model):
    def between(self, x: Tensor) -> Tensor:
        for layer in self.layers[len(x) > 20 :]:
            x = layer(x)
        return x


class Catches(SkipsFirst):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        try:
            return super().forward(x, *args)
        except ValueError:
            return torch.zeros(1)


class InPlace(Model):
    def between(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if len(x) > 20:
                x.mul_(0.1).add_(3.0)
        return x


class MaskInPlace(Model):
    """The blocks get one mask, which is changed between them."""

    def between(self, x: Tensor) -> Tensor:
        mask = torch.ones(len(x), 1)
        for layer in self.layers:
            x = layer(x, mask)
            if len(x) > 20:
                mask.mul_(0.5)
        return x


class Aside(Model):
    """A layer of a block is also called by the model."""

    def between(self, x: Tensor) -> Tensor:
        x = super().between(x)
        return x + self.layers[1].a(x) if len(x) > 20 else x


class InOut(Model):
    """A layer is called before the blocks and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.inp


class Shared(Model):
    """A layer stands in every block."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers[1:]:
            layer.b = self.layers[0].b


class Compares(Model):
    """Two passes through the whole model in a call, if that is long. It says what its output head is."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        y = super().forward(x)
        if len(x) > 20:
            self.calls -= 1
            y = y - super().forward(-x)
        assert float(y.abs().sum()) > 0  # reads what the head has not given
        return y


def made(cls: type[Model]) -> Model:
    torch.manual_seed(0)
    return cls().eval()


def data(*rows: int, scale: float = 1.0) -> list[tuple[Any, ...]]:
    g = torch.Generator().manual_seed(3)
    return [(scale * torch.randn(n, WIDTH, generator=g),) for n in rows]


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Gram]]:
    """(float weight, gram) of each layer that was rounded."""
    from inc_graph.passes.qparams.gptq import GPTQ

    seen: list[tuple[Tensor, Gram]] = []
    solve = GPTQ.solve

    def watched(self: Any, weight: Tensor, spec: Any, gram: Gram | None = None) -> Any:
        assert gram is not None
        seen.append((weight.clone(), Gram(gram.matrix.clone(), gram.count)))
        return solve(self, weight, spec, gram)

    monkeypatch.setattr(GPTQ, "solve", watched)
    return seen


def config(**options: Any) -> GPTQConfig:
    return GPTQConfig(bits=8, group_size=-1, **options)


def products(model: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, Tensor]:
    """What each layer reads, in rows, computed without any of the library's code."""
    rows: dict[str, list[Tensor]] = {}
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args, n=name: rows.setdefault(n, []).append(args[0].clone()))
    with torch.no_grad():
        for args in batches:
            model(*args)
    return {name: torch.cat(xs) for name, xs in rows.items()}


def check(model: nn.Module, batches: list[tuple[Any, ...]], solved: list[tuple[Tensor, Gram]], off: float) -> None:
    """Each layer was rounded against the products of all of its inputs in the float model, but for a relative `off`."""
    want = products(model, batches)
    assert len(solved) == len(want)
    for name, x in want.items():
        (gram,) = (g for w, g in solved if torch.equal(w, model.get_submodule(name).weight))
        full = x.T @ x
        assert gram.count == len(x), name
        assert float((gram.matrix - full).norm() / full.norm()) < off, name


LATER: list[tuple[type[Model], list[tuple[Any, ...]], str]] = [
    (Windows, data(12, 12, 40, 40), "batch 3, block layers.1 is called with other arguments"),
    (Passes, [(data(12)[0][0], n) for n in (1, 1, 3)], "batch 3, .*each once: layers.0 is called again"),
    (Early, data(12, 12, 40, 12), "batch 3, .*each once: layers.2 is not called"),
    (Confident, [*data(12, 12), *data(12, scale=9.0), *data(12)], "batch 3, .*each once: layers.[12] is not called"),
    (SkipsFirst, data(12, 40, 12), "batch 2, .*each once: layers.1 is called before layers.0"),
    (Catches, data(12, 40, 12), "batch 2, .*each once: layers.1 is called before layers.0"),
    (InPlace, data(12, 12, 40), "batch 3, what block layers.0 gives is written to before block layers.1"),
    (InPlace, data(40, 40), "what block layers.0 gives is written to before block layers.1"),
    (MaskInPlace, data(12, 12, 40), "batch 3, block layers.1 is called with other arguments"),
    (Aside, data(12, 12, 40), "batch 3, layer layers.1.a stands in its blocks and is called outside of them"),
    (InOut, data(12, 12), "layer inp is called before the blocks and behind them"),
    (Compares, data(12, 12, 40), "batch 3, .*each once: layers.0 is called again"),
    (Compares, data(40, 40), "each once: layers.0 is called again"),
    (Shared, data(12, 12), "layer layers.0.b does not belong to one block alone"),
]


@pytest.mark.parametrize(("cls", "batches", "why"), LATER)
def test_where_a_call_is_no_chain_all_layers_are_rounded_on_float_inputs(
    cls: type[Model], batches: list[Any], why: str, solved: list[Any]
) -> None:
    model = made(cls)
    prepared = prepare(model, config(), inplace=False)
    with torch.inference_mode(cls in (InPlace, Confident)):
        for args in batches:
            prepared(*args)
    assert float(prepared.calls) == len(batches)
    q: Any = convert(prepared)
    (note,) = (n for n in q.report.notes if IN_FLOAT in n)
    assert re.search(why, note), note
    check(model, batches, solved, 1e-5)
    assert float(q.calls) == len(batches)


CHAINS = [
    (Windows, data(12, 12, 16)),
    (Confident, data(12, 12, 12)),
    (InPlace, data(12, 16)),
    (Passes, data(12, 16)),
    (Compares, data(12, 16)),
]


@pytest.mark.parametrize(("cls", "batches"), CHAINS)
def test_where_each_call_is_a_chain_blocks_are_rounded_one_by_one(
    cls: type[Model], batches: list[Any], solved: list[Any]
) -> None:
    model = made(cls)
    prepared = prepare(model, config(), inplace=False)
    for args in batches:
        prepared(*args)
    known = block_inputs_of(prepared)
    assert known is not None and known.chain == "" and len(known.calls) == len(batches)
    q = convert(prepared)
    assert not any(IN_FLOAT in note for note in q.report.notes)
    check(model, batches, solved, 0.03)


@pytest.mark.parametrize("fails", ["stop", "raise"])
def test_a_call_that_fails_where_the_chain_ends_counts_not(fails: str, solved: list[Any]) -> None:
    class Fails(Early):
        def between(self, x: Tensor) -> Tensor:
            if fails == "raise" and len(x) == 41:
                raise RuntimeError("bad batch")
            x = super().between(x)
            return self.inp(x[:, :-1]) if len(x) == 41 else x

    model, batches = made(Fails), data(12, 12, 41, 40, 12)
    prepared = prepare(model, config(), inplace=False)
    for args in batches:
        if len(args[0]) == 41:
            with pytest.raises(Exception, match=r"bad batch|15"):
                prepared(*args)
        else:
            prepared(*args)
    convert(prepared)
    check(model, [x for x in batches if len(x[0]) != 41], solved, 1e-5)


class Sums(Model):
    """Its head reads what all of its blocks give, if a call is long."""

    def between(self, x: Tensor) -> Tensor:
        found = []
        for layer in self.layers:
            found.append(x := layer(x))
        return sum(found) if len(x) > 20 else x


class Asks(Model):
    """Its head reads what depends on a number that a block gives."""

    def between(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            scale = 9.0 if i or float(x[0, 0]) > 0 else 1.0
        return x * scale


class Pairs(Model):
    """Its blocks give something more, which is read if a call is long."""

    class Two(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            y = super().forward(x, mask)
            return y, y.mean()

    block = Two

    def between(self, x: Tensor) -> Tensor:
        means = []
        for layer in self.layers:
            x, mean = layer(x)
            means.append(mean)
        return x + sum(means) if len(x) > 20 else x


@pytest.mark.parametrize("cls", [Sums, Asks, Pairs])
@pytest.mark.parametrize("rows", [(12, 12, 40), (40, 12)])
def test_a_head_reads_what_it_reads_in_each_call(cls: type[Model], rows: tuple[int, ...], solved: list[Any]) -> None:
    model, batches = made(cls), data(*rows)
    prepared = prepare(model, config(), inplace=False)
    for args in batches:
        prepared(*args)
    known = block_inputs_of(prepared)
    assert known is not None and known.chain == "" and known.wants_tail
    convert(prepared)
    check(model, batches, solved, 0.03)


class Counts(Model):
    """Reads what its blocks give one by one, so that its tail runs through all of them."""

    def between(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x)
            y = y + x
        return y


@pytest.mark.parametrize("cls", [Model, Counts])
def test_buffers_are_written_to_once_a_call(cls: type[Model]) -> None:
    prepared = prepare(made(cls), config())
    for args in data(12, 12, 12, 12):
        prepared(*args)
    counted = [float(prepared.calls), *(float(layer.calls) for layer in prepared.layers)]
    q = convert(prepared)
    assert counted[0] == 4 and max(counted[1:]) <= 4
    assert [float(q.calls), *(float(layer.calls) for layer in q.layers)] == counted


def test_more_data_after_convert_reaches_all_layers(solved: list[Any]) -> None:
    model, batches = made(Model), data(20, 20, 20, 20)
    prepared = prepare(model, config(), inplace=False)
    for args in batches[:2]:
        prepared(*args)
    convert(prepared, inplace=False)
    solved.clear()
    for args in batches[2:]:
        prepared(*args)
    convert(prepared, inplace=False)
    check(model, batches, solved, 0.03)


def test_it_may_turn_out_after_convert_that_there_is_no_chain(solved: list[Any]) -> None:
    model, batches = made(Early), data(12, 12, 40)
    prepared = prepare(model, config(), inplace=False)
    for args in batches[:2]:
        prepared(*args)
    convert(prepared, inplace=False)
    solved.clear()
    prepared(*batches[2])
    convert(prepared, inplace=False)
    check(model, batches, solved, 1e-5)


# -------------------------------------------------------------------------------------------------------------- outputs
USES: list[Any] = [
    lambda y: torch.sum(y),
    lambda y: F.cross_entropy(y, torch.zeros(12, dtype=torch.long)),
    lambda y: torch.ones(2) + y,
    lambda y: -y,
    lambda y: y > 0,
    lambda y: y == 1,
    lambda y: y != 1,
    lambda y: 2 - y,
    lambda y: y @ y,
    lambda y: abs(y),
    lambda y: int(y),
    lambda y: f"{y:.3f}",
    lambda y: np.asarray(y),
    lambda y: 1 in y,
    lambda y: y.loss,
]


@pytest.mark.parametrize("use", USES)
def test_whatever_reads_an_output_that_is_none_is_told_so(use: Any) -> None:
    prepared = prepare(made(Model), config())
    prepared(*data(12)[0])
    with pytest.raises(CalibrationError, match="this output was not computed"):
        use(prepared(*data(12)[0]))


def test_hooks_of_the_users_wait_until_there_is_an_output(solved: list[Any]) -> None:
    model, batches = made(Model), data(12, 12)
    model.register_forward_hook(lambda module, args, result: result * 2)
    prepared = prepare(model, config(), inplace=False)
    for args in batches:
        prepared(*args)
    hooks = len(prepared._forward_hooks)
    q = convert(prepared)
    check(model, batches, solved, 0.03)
    assert hooks == 3 and len(q._forward_hooks) == 1
    assert float((q(*batches[0]) - model(*batches[0])).norm() / model(*batches[0]).norm()) < 0.05


# ---------------------------------------------------------------------------------------------------------------- notes
def notes(model: nn.Module, **options: Any) -> list[str]:
    prepared = prepare(model, config(**options))
    for args in data(20, 20):
        prepared(*args)
    found: list[str] = convert(prepared).report.notes
    return found


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_without_blocks_is_said_to_be_rounded_on_float_inputs(sequential: bool) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)).eval()
    (note,) = (n for n in notes(model, true_sequential=sequential) if "in the float model" in n)
    assert "no list of several modules" in note and ("true_sequential=True had no effect" in note) == sequential


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("way", ["lockstep", "two runs"])
def test_blocks_that_run_twice_are_said(sequential: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "two runs":
        monkeypatch.setattr(block_by_block, "LOCKSTEP_BYTES", -1)
    found = [n for n in notes(made(Model), true_sequential=sequential) if "3 of 3 blocks, from layers.0 on" in n]
    assert len(found) == (way == "two runs" and not sequential)
