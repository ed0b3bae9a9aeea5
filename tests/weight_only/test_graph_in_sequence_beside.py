"""Exported graphs rounded in sequence: other methods beside it, and where it is not done."""

from __future__ import annotations

import copy
import io
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph import in_sequence
from inc_graph.capture import capture
from inc_graph.errors import CalibrationError, IncWarning
from inc_graph.quantization import (
    GPTQConfig,
    RTNConfig,
    StaticQuantConfig,
    convert,
    graph_in_sequence,
    kept_calls,
    prepare,
    quantize,
)
from inc_graph.side_by_side import SideBySide, why_not
from inc_graph.weights import Gram
from tests.weight_only import sequence_models
from tests.weight_only.sequence_models import (
    ROWS,
    WIDTH,
    Net,
    data,
    error,
    float_weights,
    made,
    prepared_graph,
    products,
    quietly,
)

computed, grams = sequence_models.computed, sequence_models.grams  # fixtures


# ------------------------------------------------------------------------------------------- other methods beside it
def test_layers_that_need_no_data_are_told_too(grams: list[Gram]) -> None:
    model, batches = made(blocks=2), data()
    config = GPTQConfig(group_size=16, bits=3).set_local("blocks.0.down", RTNConfig(bits=2, group_size=16))
    quietly(prepared_graph(model, config, batches))
    mixed = copy.deepcopy(model)
    q = quietly(prepared_graph(model, config, batches))
    for path, weight in float_weights(q).items():
        if path.startswith("blocks.0."):
            mixed.get_submodule(path).weight.data = weight
    want, plain = (products(m, "blocks.1.q", batches) for m in (mixed, model))
    assert float((grams[2].matrix - want).norm()) < 0.2 * float((plain - want).norm())


def test_beside_what_observes_activations_calls_compute() -> None:
    model, batches = made(blocks=2), data()
    config = GPTQConfig(group_size=16, bits=3, white_list=["blocks.0"]) + StaticQuantConfig(white_list=["blocks.1.k"])
    prepared = prepared_graph(model, config)
    for x in batches:
        assert torch.allclose(prepared(x), model(x), atol=1e-5)
    q = quietly(prepared)
    assert "calibrate" in dict(q.report.timings) and error(q, model, batches[0]) < 0.5
    with pytest.raises(CalibrationError):
        prepared(batches[0].index_fill(0, torch.tensor(0), torch.inf))  # an observer of activations refuses it
    assert torch.equal(quietly(prepared)(batches[0]), q(batches[0]))  # so it counts nowhere


@pytest.mark.parametrize("way", ["in sequence", "in a file", "in the float model"])
def test_a_tied_layer_is_rounded_once_on_all_of_its_inputs(
    grams: list[Gram], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = made(blocks=2), data()
    model.blocks[1].q.weight = model.blocks[0].q.weight
    monkeypatch.setattr(graph_in_sequence, "LIMIT", 1 << 31 if way == "in sequence" else -1)
    if way == "in the float model":
        monkeypatch.setattr(graph_in_sequence.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    q = quietly(prepared_graph(model, batches=batches))
    assert bool(in_float(q)) == (way == "in the float model")
    assert len(grams) == 5 and len({line.name for line in q.report.weights}) == 6
    weights = float_weights(q)
    assert torch.equal(weights["blocks.0.q"], weights["blocks.1.q"])
    both = products(model, "blocks.0.q", batches) + products(model, "blocks.1.q", batches)
    assert float((grams[0].matrix - both).norm() / both.norm()) < 0.02  # bfloat16
    assert grams[0].count == 2 * sum(map(len, batches))
    if way != "in the float model":  # k of the second block is not tied, and sees what the rounded layers give
        mixed = copy.deepcopy(model)
        for path in ("blocks.0.q", "blocks.0.k", "blocks.0.down"):
            mixed.get_submodule(path).weight.data = weights[path]
        want, plain = products(mixed, "blocks.1.k", batches), products(model, "blocks.1.k", batches)
        assert float((grams[3].matrix - want).norm()) < 0.2 * float((plain - want).norm())


def test_a_layer_that_is_called_several_times(grams: list[Gram]) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.layer(x).tanh() * 2
            return x

    model, batches = made(Again), data()
    q = quietly(prepared_graph(model, batches=batches))
    want = products(model, "layer", batches)  # of all three calls
    assert len(grams) == 1 and float((grams[0].matrix - want).norm() / want.norm()) < 0.02
    assert grams[0].count == 3 * sum(map(len, batches)) and error(q, model, batches[0]) < 0.5
    bad = prepared_graph(model, batches=[*batches[:2], batches[2].index_fill(0, torch.tensor(0), torch.inf)])
    with pytest.raises(CalibrationError, match="its input holds NaN or infinity"):
        convert(bad)


class Again(nn.Module):
    """One layer at three places, and one that reads what it reads at the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x) * 3)
        y = self.a(x) + self.b(x)
        return self.a(torch.relu(self.c(y)) * 5)


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("kind", ["again", "tied"])
def test_a_weight_is_rounded_for_all_of_its_readers(
    kind: str, sequence: bool, computed: torch.dtype, grams: list[Gram], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = made(Again) if kind == "again" else made(blocks=2), data()
    paths = ["a"]
    if kind == "tied":
        paths = ["blocks.0.q", "blocks.1.q", "blocks.1.k"]
        for block, name in ((0, "k"), (1, "q"), (1, "k")):
            model.get_submodule(f"blocks.{block}.{name}").weight = model.blocks[0].q.weight
    prepared = prepared_graph(model, batches=batches)
    if not sequence:
        monkeypatch.setattr(graph_in_sequence, "LIMIT", -1)
    q = quietly(prepared, reference=True)
    # a source counts once, however many read it
    want = sum(products(model, path, batches) for path in (["a"] if kind == "again" else ["blocks.0.q", "blocks.1.q"]))
    assert float((grams[0].matrix - want).norm() / want.norm()) < 0.02
    assert grams[0].count == sum(map(len, batches)) * (3 if kind == "again" else 2)
    weight = model.get_submodule(paths[0]).weight.detach()
    rounded = float_weights(q)[paths[0]]
    off = float(((rounded - weight) @ want * (rounded - weight)).sum())
    whole = float((weight @ want * weight).sum())
    for line in q.report.weights:
        if line.name in paths:
            assert line.error == pytest.approx((off / whole) ** 0.5, rel=0.05)
            assert line.rank is None


def test_a_kernel_that_strides_otherwise_elsewhere(grams: list[Gram], computed: torch.dtype) -> None:
    class Strides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, stride=2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * 4)

    torch.manual_seed(0)
    model, x = Strides().eval(), torch.randn(8, 4, 32)
    prepared: Any = prepare(model, GPTQConfig(bits=4, group_size=-1, white_list=[nn.Conv1d]), example_inputs=(x,))
    prepared(x)
    quietly(prepared)
    inner = torch.relu(model.a(x)) * 4
    windows = [x.unfold(2, 3, 1), inner.unfold(2, 3, 2)]
    rows = [w.movedim(1, 2).flatten(2).flatten(0, 1) for w in windows]
    want = sum(r.T @ r for r in rows).detach()
    assert grams[0].count == sum(map(len, rows))
    assert float((grams[0].matrix - want).norm() / want.norm()) < 0.02


# ------------------------------------------------------------------------------------------------------ where it is not
def in_float(q: Any) -> str:
    return next((note for note in q.report.notes if "in the float model" in note), "")


def check_float_grams(grams: list[Gram], model: nn.Module, batches: list[Tensor]) -> None:
    paths = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(grams) == len(paths)
    for path, gram in zip(paths, grams, strict=True):
        torch.testing.assert_close(gram.matrix, products(model, path, batches), rtol=1e-4, atol=1e-3)


def files_of(monkeypatch: pytest.MonkeyPatch, room: bool) -> list[Any]:
    """The temporary files that are made from now on; without room they take nothing."""
    found: list[Any] = []
    made = tempfile.TemporaryFile

    class Full(io.RawIOBase):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

        def seek(self, *args: Any) -> int:
            return 0

    def file(**kwargs: Any) -> Any:
        found.append(made(**kwargs) if room else Full())
        return found[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", file)
    return found


@pytest.mark.parametrize("where", ["arguments", "values"])
def test_calls_that_hold_too_much_wait_in_a_file(
    where: str, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = made(), [torch.cat([x] * 4) for x in data()]
    want = quietly(prepared_graph(model, batches=batches))
    files = files_of(monkeypatch, room=True)
    monkeypatch.setattr(kept_calls if where == "arguments" else graph_in_sequence, "LIMIT", batches[0].nbytes + 1)
    prepared = prepared_graph(model, batches=batches[:2])
    sequence = SideBySide.to
    held: list[int] = []

    def watched(self: SideBySide, goal: Any) -> Any:
        found = sequence(self, goal)
        held.append(sum(x.nbytes for x in self.held() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)))
        return found

    monkeypatch.setattr(SideBySide, "to", watched)
    for x in batches[2:]:
        prepared(x)
    first = quietly(prepared)
    assert len(files) == 1 and not in_float(first)
    assert len(held) == 6 and max(held) == 0, "while calls wait, nothing of them is in memory"
    assert torch.equal(first(batches[0]), want(batches[0]))
    assert torch.equal(quietly(copy.deepcopy(prepared))(batches[0]), want(batches[0]))


def test_no_room_for_calls_that_wait(grams: list[Gram], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = made(), data()
    prepared = prepared_graph(model, batches=batches)
    monkeypatch.setattr(graph_in_sequence, "LIMIT", 1000)
    usage = SimpleNamespace(free=2000)
    monkeypatch.setattr(graph_in_sequence.shutil, "disk_usage", lambda folder: usage)
    with pytest.warns(IncWarning, match=r"in the float model.*calls that wait for each other would hold"):
        q: Any = convert(prepared)
    assert "calls that wait for each other would hold" in in_float(q) and "for temporary files" in in_float(q)
    check_float_grams(grams, model, batches)


def test_no_room_for_arguments(grams: list[Gram], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = made(), [torch.cat([x] * 4) for x in data()]
    files_of(monkeypatch, room=False)
    monkeypatch.setattr(kept_calls, "LIMIT", batches[0].nbytes + batches[1].nbytes + 1)
    prepared = prepared_graph(model, batches=batches[:2])
    with pytest.warns(IncWarning, match=r"in the float model.*the arguments of its calls take.*No space left"):
        prepared(batches[2])
    prepared(batches[3])
    q = quietly(prepared)
    assert "the arguments of its calls take" in in_float(q)
    check_float_grams(grams, model, batches)


class Counts(Net):
    """Writes to a buffer."""

    def __init__(self) -> None:
        super().__init__(1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x) + self.calls


class Branches(Net):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Random(Net):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand_like(x)


@pytest.mark.parametrize(("cls", "why"), [(Counts, "writes to"), (Branches, "control flow"), (Random, "random")])
def test_graphs_whose_calls_cannot_wait(cls: Any, why: str, grams: list[Gram]) -> None:
    model, batches = made(cls), data()
    prepared = prepared_graph(model)
    for x in batches:
        assert prepared(x).shape == x.shape  # calls compute
    q = quietly(prepared)
    assert why in in_float(q)
    check_float_grams(grams, made(Net, blocks=1), batches)


def test_dropout_and_attention_draw_nothing_in_inference() -> None:
    class Attends(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.p, self.drop = p, nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.p))

    x = torch.randn(1, 2, 4, 8)
    assert why_not(capture(Attends(0.0).eval(), (x,))) == ""
    assert "random" in why_not(capture(Attends(0.5).eval(), (x,)))


def test_operators_that_take_no_mixed_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings of complex numbers: there is no complex bfloat16."""

    class Turns(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            y = self.blocks[0].q(x)
            z = torch.view_as_complex(y.reshape(-1, WIDTH // 2, 2)) * torch.polar(torch.ones(16), torch.arange(16.0))
            return self.blocks[0].k(torch.view_as_real(z).flatten(1))

    monkeypatch.setattr(in_sequence, "fast_dtype", lambda: torch.bfloat16)
    model, batches = made(Turns, blocks=1), data()
    q = quietly(prepared_graph(model, batches=batches))
    assert not in_float(q) and error(q, model, batches[0]) < 0.5


def test_quantize_in_one_call() -> None:
    model, batches = made(), data()
    example = {"example_inputs": (batches[0],), "dynamic_shapes": ROWS}
    q: Any = quantize(model, GPTQConfig(group_size=16), lambda m: [m(x) for x in batches], **example)
    assert error(q, model, batches[0]) < 0.3 and dict(q.report.timings)["calibrate"] > 0
