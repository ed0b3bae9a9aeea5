"""Calibration that stops at the first block, and rounding block by block on what the rounded blocks before give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import CalibrationError, IncWarning
from inc_graph.quantization import (
    GPTQConfig,
    RTNConfig,
    block_by_block,
    convert,
    finalize_calibration,
    prepare,
    quantize,
)
from inc_graph.quantization.block_inputs import block_inputs_of
from inc_graph.weights import Gram
from tests.weight_only.sequence_models import products


class Block(nn.Module):
    def __init__(self, width: int = 32, tuples: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.tuples = tuples
        self.calls = 0

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        self.calls += 1
        h = self.norm(x)
        y = x + self.down(torch.tanh(self.q(h)) * self.k(h))
        y = y if shift is None else y + shift
        return (y,) if self.tuples else y


class Model(nn.Module):
    def __init__(self, blocks: int = 3, tuples: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block(tuples=tuples) for _ in range(blocks))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.full((1,), 0.25)
        h = self.first(x)
        for block in self.blocks:
            h = block(h, shift=shift)
            h = h[0] if isinstance(h, tuple) else h
        return self.head(h)


def data(n: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(24, 16, generator=g) for _ in range(n)]


def made(cls: Any = Model, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(**kwargs).eval()


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], Gram]]:
    """(shape of the weight, gram) of each layer in the order in which they are rounded."""
    from inc_graph.passes.qparams.gptq import GPTQ

    seen: list[tuple[tuple[int, ...], Gram]] = []
    solve = GPTQ.solve

    def watched(self: Any, weight: Tensor, spec: Any, gram: Gram | None = None) -> Any:
        assert gram is not None
        seen.append((tuple(weight.shape), gram))
        return solve(self, weight, spec, gram)

    monkeypatch.setattr(GPTQ, "solve", watched)
    return seen


def near(a: Tensor, b: Tensor) -> None:
    """Equal but for what computing in bfloat16 changes."""
    assert float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("tuples", [False, True])
def test_calibration_stops_at_the_first_block(tuples: bool) -> None:
    model = made(tuples=tuples)
    prepared: Any = prepare(model, GPTQConfig(group_size=16))
    for x in data():
        result = prepared(x)
    calls = [block.calls for block in prepared.blocks]
    assert calls == [1, 1, 1]  # the first batch runs through all of it; block 0 is not entered again
    known = block_inputs_of(prepared)
    assert known is not None and known.chain == "" and len(known.calls) == 4
    for use in (lambda: result.logits, lambda: result[0], lambda: float(result), lambda: result + 1):
        with pytest.raises(CalibrationError, match="calibration stops"):
            use()


@pytest.fixture(params=["lockstep", "two runs"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a block is run: calls that wait for its layers to be rounded, or twice."""
    if request.param == "two runs":
        monkeypatch.setattr(block_by_block, "LOCKSTEP_BYTES", -1)
    return str(request.param)


def test_each_block_is_rounded_on_what_the_rounded_ones_give(grams: list[Any], way: str) -> None:
    model, batches = made(), data()
    original = copy.deepcopy(model)
    prepared = prepare(model, GPTQConfig(group_size=16, bits=3))
    for x in batches:
        prepared(x)
    q: Any = convert(prepared)
    paths = ["first", *(f"blocks.{i}.{n}" for i in range(3) for n in ("q", "k", "down")), "head"]
    assert len(grams) == len(paths)
    mixed = copy.deepcopy(original)  # becomes the quantized model, block after block
    for path, (shape, gram) in zip(paths, grams, strict=True):
        if path == "blocks.0.q":  # what stands before the blocks is rounded before they see it
            mixed.get_submodule("first").weight.data = q.get_submodule("first").weight.detach()
        if path.startswith("blocks.") and path.endswith(".q"):
            i = int(path.split(".")[1])
            for before in [f"blocks.{i - 1}.{n}" for n in ("q", "k", "down")] if i else []:
                mixed.get_submodule(before).weight.data = q.get_submodule(before).weight.detach()
        if path.endswith(".down") and way == "lockstep":
            for n in ("q", "k"):
                before = f"{path.removesuffix('.down')}.{n}"
                mixed.get_submodule(before).weight.data = q.get_submodule(before).weight.detach()
        assert shape == tuple(original.get_submodule(path).weight.shape)
        if path != "head":
            near(gram.matrix, products(mixed, path, batches))
            assert gram.count == 4 * 24
        else:
            for n in ("q", "k", "down"):
                mixed.get_submodule(f"blocks.2.{n}").weight.data = q.get_submodule(f"blocks.2.{n}").weight.detach()
            near(gram.matrix, products(mixed, path, batches))
    assert grams[1][1].known is grams[2][1].known  # q and k read the same tensor


def test_true_sequential_sees_the_rounded_layers_of_its_own_block(grams: list[Any], way: str) -> None:
    model, batches = made(blocks=2), data()
    original = copy.deepcopy(model)
    prepared = prepare(model, GPTQConfig(group_size=16, bits=2, true_sequential=True))
    for x in batches:
        prepared(x)
    q: Any = convert(prepared)
    original.get_submodule("first").weight.data = q.get_submodule("first").weight.detach()
    mixed = copy.deepcopy(original)
    for n in ("q", "k"):
        mixed.get_submodule(f"blocks.0.{n}").weight.data = q.get_submodule(f"blocks.0.{n}").weight.detach()
    want, plain = products(mixed, "blocks.0.down", batches), products(original, "blocks.0.down", batches)
    have = grams[3][1].matrix
    assert float((have - want).norm()) < 0.2 * float((have - plain).norm())


def test_the_float_model_is_untouched_and_may_be_converted_again() -> None:
    model, batches = made(), data()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, GPTQConfig(group_size=16), inplace=False)
    for x in batches[:2]:
        prepared(x)
    first = convert(prepared, inplace=False)(batches[0])
    again = convert(prepared, inplace=False)(batches[0])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for x in batches[2:]:
        prepared(x)
    more = convert(prepared)(batches[0])
    assert not torch.equal(first, more)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model(batches[0]).shape == (24, 8)


def test_quantize_puts_the_model_back_if_the_data_fails() -> None:
    model = made()
    want = model(data()[0])

    def run(prepared: nn.Module) -> None:
        prepared(data()[0])
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        quantize(model, GPTQConfig(group_size=16), run)
    assert torch.equal(model(data()[0]), want) and "forward" not in vars(model)


def test_without_data() -> None:
    with pytest.raises(CalibrationError, match="seen no calibration data"):
        convert(prepare(made(), GPTQConfig(group_size=16)))


def test_after_finalize_calibration_nothing_is_taken_in() -> None:
    model, x = made(), data()[0]
    prepared: Any = prepare(model, GPTQConfig(group_size=16), inplace=False)
    with pytest.raises(CalibrationError, match="seen no calibration data"):
        finalize_calibration(prepared)
    prepared(x)
    finalize_calibration(prepared)
    assert torch.allclose(prepared(x), model(x), atol=1e-5)  # the whole model runs again
    known = block_inputs_of(prepared)
    assert known is not None and len(known.calls) == 1
    with pytest.warns(IncWarning, match="fewer rows"):
        q: Any = convert(prepared)
    assert {line.name for line in q.report.weights} >= {"first", "blocks.2.down", "head"}


def test_few_rows_are_warned_of_with_the_rank() -> None:
    prepared = prepare(made(), GPTQConfig(group_size=16))
    prepared(data()[0][:5])
    with pytest.warns(IncWarning, match=r"fewer rows of calibration data than inputs.*rank 5"):
        q: Any = convert(prepared)
    assert {line.rank for line in q.report.weights} == {5}


class Twice(Block):
    """Calls one of its layers twice."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        return super().forward(x + self.q(x), shift)


def test_a_layer_that_is_called_twice(grams: list[Any]) -> None:
    model, batches = made(), data()
    model.blocks = nn.ModuleList(Twice() for _ in range(2)).eval()
    original = copy.deepcopy(model)
    prepared = prepare(model, GPTQConfig(group_size=16))
    for x in batches:
        prepared(x)
    q = convert(prepared)
    original.get_submodule("first").weight.data = q.get_submodule("first").weight.detach()
    near(grams[1][1].matrix, products(original, "blocks.0.q", batches))
    assert grams[1][1].count == 2 * 4 * 24


def test_a_failure_in_the_middle_of_a_block_leaves_the_model_prepared(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inc_graph.passes.qparams.gptq import GPTQ

    prepared: Any = prepare(made(), GPTQConfig(group_size=16))
    for x in data():
        prepared(x)
    solve, count = GPTQ.solve, 0

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:  # in the second block
            raise RuntimeError("out of luck")
        return solve(self, *args, **kwargs)

    monkeypatch.setattr(GPTQ, "solve", fails)
    with pytest.raises(Exception, match="out of luck"):
        convert(prepared)
    monkeypatch.setattr(GPTQ, "solve", solve)
    assert type(prepared.blocks[1].q).__name__ == "Leaf"
    assert convert(prepared)(data()[0]).shape == (24, 8)


# --------------------------------------------------------------------------------------------- models without a chain
class Skips(Model):
    """The last block reads the input of the first one."""

    def forward(self, x: Tensor) -> Tensor:
        h = start = self.first(x)
        for block in self.blocks[:-1]:
            h = block(h)
        return self.head(self.blocks[-1](start) + h)


class Positions(Model):
    """Each block has an argument of its own."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for i, block in enumerate(self.blocks):
            h = block(h, torch.full((1,), float(i)))
        return self.head(h)


class Nested(nn.Module):
    """No list of blocks at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(16, 32), nn.ReLU()), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize("cls", [Skips, Positions, Nested])
def test_models_whose_blocks_are_no_chain(cls: Any, grams: list[Any]) -> None:
    model, batches = made(cls), data()
    original = copy.deepcopy(model)
    prepared = prepare(model, GPTQConfig(group_size=16))
    results = [prepared(x) for x in batches]
    with torch.no_grad():
        want = [original(x) for x in batches]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results, want, strict=True))
    q: Any = convert(prepared)
    names = [name for name, m in original.named_modules() if isinstance(m, nn.Linear)]
    for name, (_, gram) in zip(names, grams, strict=True):
        near(gram.matrix, products(original, name, batches))
    said = any("not block by block" in note for note in q.report.notes)
    assert said == (cls is not Nested)


def test_rtn_needs_no_data_and_no_stop() -> None:
    model = made()
    prepared = prepare(model, RTNConfig(group_size=16))
    assert block_inputs_of(prepared) is None
    assert isinstance(prepared(data()[0]), Tensor)


def test_mixed_methods_share_the_run(grams: list[Any]) -> None:
    config = GPTQConfig(group_size=16).set_local(".*down", RTNConfig(bits=8, group_size=16))
    prepared = prepare(made(), config)
    for x in data():
        prepared(x)
    q: Any = convert(prepared)
    assert len(grams) == 1 + 3 * 2 + 1
    algorithms = {line.name: line.algorithm.partition("{")[0] for line in q.report.weights}
    assert algorithms["blocks.0.down"] == "rtn" and algorithms["blocks.0.q"] == "gptq"


class Headed(Model):
    """Says what its output head is, as the models of transformers do."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Rounds(Headed):
    """Runs through its blocks twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in [*self.blocks, *self.blocks]:
            h = block(h)
        return self.head(h)


@pytest.mark.parametrize("quantized", [False, True])
def test_an_output_head_is_not_run_while_calibrating(quantized: bool) -> None:
    model = made(Headed)
    config = GPTQConfig(bits=4, group_size=16, use_sym=False)
    if not quantized:
        config.set_local("head", GPTQConfig(dtype="fp32"))
    prepared = prepare(model, config)
    calls: list[int] = []
    prepared.head.register_forward_hook(lambda *a: calls.append(1))
    for x in data():
        prepared(x)
    assert calls == []
    found = block_inputs_of(prepared)
    assert found is not None and found.chain == "" and found.wants_tail is quantized
    report = convert(prepared).report
    assert len(report.weights) == 10 + quantized  # the head's inputs come from behind the rounded blocks
    assert all(line.error < line.rounded for line in report.weights)


def test_blocks_that_are_run_through_twice_are_no_chain() -> None:
    prepared = prepare(made(Rounds), GPTQConfig(bits=4, group_size=16))
    prepared(data()[0])
    found = block_inputs_of(prepared)
    assert found is not None and found.chain is not None and "each once" in found.chain


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.wide(x)))


def test_blocks_of_convolutions_are_rounded_on_the_inputs_of_the_float_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(3))).eval()
    config = GPTQConfig(dtype="fp32").set_local(nn.Conv2d, GPTQConfig(bits=4, group_size=-1))
    prepared = prepare(model, config)
    for x in torch.randn(3, 2, 8, 6, 6):
        prepared(x)
    report = convert(prepared).report
    assert len(report.weights) == 6 and all(line.error < line.rounded for line in report.weights)
    assert "convolutions in its blocks" in str(report)


def test_a_model_that_is_its_own_list_of_blocks() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(*(Block() for _ in range(3))).eval(), torch.randn(4, 24, 32)
    prepared = prepare(model, GPTQConfig(bits=4, group_size=16))
    for x in batches:
        prepared(x)
    found = block_inputs_of(prepared)
    assert found is not None and found.paths == ["0", "1", "2"] and found.chain == ""
    assert len(convert(prepared).report.weights) == 9
