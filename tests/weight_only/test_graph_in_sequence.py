"""Exported graphs whose layers are rounded in sequence, each on what the rounded ones before it give."""

from __future__ import annotations

import copy
import gc
import io
import tempfile
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from inc_graph import in_sequence
from inc_graph.capture import capture
from inc_graph.errors import CalibrationError, IncError, IncWarning
from inc_graph.lowering._onednn import HAS_OPAQUE
from inc_graph.quantization import (
    GPTQConfig,
    RTNConfig,
    StaticQuantConfig,
    block_by_block,
    convert,
    finalize_calibration,
    graph_in_sequence,
    kept_calls,
    prepare,
    quantize,
)
from inc_graph.quantization.kept_calls import flat_inputs
from inc_graph.side_by_side import SideBySide, why_not
from inc_graph.weights import Gram
from tests.graph_generator import KINDS, RandomModel

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


# ------------------------------------------------------------------------------------------------------ the interpreter
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.randoms(use_true_random=False))
def test_computed_side_by_side_is_what_the_graph_gives(seed: int, size: int, rng: Any) -> None:
    model = RandomModel(seed, size, kinds=tuple(k for k in KINDS if k != "buffer"))
    args, kwargs = model.inputs()
    gm = capture(model, args, kwargs)
    assert why_not(gm) == ""
    calls = [model.inputs(seed=i) for i in range(3)]
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    stops = [n for n in nodes if rng.random() < 0.3] + [next(iter(gm.graph.find_nodes(op="output")))]
    run = SideBySide(gm, [flat_inputs(gm, *call) for call in calls], stops)
    for stop in stops:
        values = run.to(stop)
    with torch.no_grad():
        for (args, kwargs), have in zip(calls, values, strict=True):
            want = gm(*args, **kwargs)
            assert len(have) == len(want)
            assert all(torch.equal(a, b) for a, b in zip(have, want.values(), strict=True))


def test_arguments_in_any_form_and_order() -> None:
    class Tree(nn.Module):
        def forward(self, a: Tensor, pair: Any, *, named: Any) -> Tensor:
            return a + 2 * pair[0] + 4 * pair[1]["x"] + 8 * pair[1]["y"] + 16 * named

    one = torch.ones(2)
    gm = capture(Tree().eval(), (one, (one, {"x": one, "y": one})), {"named": one})
    for args, kwargs in (
        ((one, (2 * one, {"y": 4 * one, "x": 3 * one})), {"named": 5 * one}),
        ((one,), {"named": 5 * one, "pair": (2 * one, {"x": 3 * one, "y": 4 * one})}),
    ):
        flat = flat_inputs(gm, args, kwargs)
        assert [float(x[0]) for x in flat] == [1, 2, 3, 4, 5]


def test_values_are_dropped_after_their_last_reader() -> None:
    depth = 12
    gm = capture(nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(8, 8), nn.Tanh()))).eval(),
                 (torch.zeros(2, 8),))  # fmt: skip
    layers = [n for n in gm.graph.nodes if "linear" in str(n.target)]
    run = SideBySide(gm, [[torch.zeros(2, 8)] for _ in range(5)], layers)
    seen = []
    for layer in layers:
        seen.append([weakref.ref(x) for x in run.to(layer)])
        assert sum(x.shape == (2, 8) for x in run.held()) == 5  # one value a call
    gc.collect()
    assert all(ref() is None for refs in seen[:-1] for ref in refs)
    assert run.waiting_bytes() == 5 * 2 * 8 * 4


def test_waiting_bytes_of_calls_of_many_sizes() -> None:
    gm = capture(made(), (torch.zeros(8, WIDTH),), dynamic_shapes=({0: Dim("rows", min=2)},))
    layers = [n for n in gm.graph.nodes if "linear" in str(n.target)]
    calls = [[torch.zeros(n, WIDTH)] for n in (4, 16, 100)]
    assert SideBySide(gm, calls, layers).waiting_bytes() == 3 * 120 * WIDTH * 4  # x, h, and what q gives


def test_what_no_goal_needs_is_not_computed_and_nothing_twice() -> None:
    gm = capture(made(), (torch.zeros(8, WIDTH),))
    layers = [n for n in gm.graph.nodes if "linear" in str(n.target)]
    run = SideBySide(gm, [[torch.zeros(8, WIDTH)]], layers[:3])
    assert not run.ahead(layers[3])
    run.to(layers[2])
    for passed in layers[:4]:
        with pytest.raises(IncError, match="have passed this node, or do not come there"):
            run.to(passed)


# ----------------------------------------------------------------------------------------------------- what it is for
def test_each_layer_is_rounded_on_what_the_rounded_ones_give(grams: list[Gram], computed: torch.dtype) -> None:
    model, batches = made(), data()
    mixed = copy.deepcopy(model)  # becomes the quantized model, layer after layer
    q: Any = quietly(prepared_graph(model, batches=batches))
    paths = [f"blocks.{i}.{n}" for i in range(3) for n in ("q", "k", "down")]
    weights = {line.name for line in q.report.weights}
    assert weights == set(paths) and len(grams) == len(paths)
    rounded = float_weights(q)
    for path, gram in zip(paths, grams, strict=True):
        want = products(mixed, path, batches)
        assert float((gram.matrix - want).norm() / want.norm()) < (1e-5 if computed == torch.float32 else 0.02)
        assert gram.count == sum(map(len, batches))
        if path.endswith(".k"):
            continue  # reads what q reads: rounded at one stop
        for name in ("q", "k") if path.endswith(".q") else ("down",):
            at = path.rpartition(".")[0] + "." + name
            mixed.get_submodule(at).weight.data = rounded[at]
    assert grams[0].known is grams[1].known


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


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"use_sym": False}], ids=str)
def test_as_layer_by_layer(computed: torch.dtype, options: dict[str, Any]) -> None:
    model, batches = made(blocks=4), data(6)
    config = GPTQConfig(group_size=16, bits=3, **options)
    layers = prepare(copy.deepcopy(model), config)
    for x in batches:
        layers(x)
    want = quietly(layers, reference=True)
    have = quietly(prepared_graph(model, config, batches), reference=True)
    assert torch.equal(have(batches[0]), want(batches[0]))


def test_a_llama_as_layer_by_layer(computed: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()

    class Logits(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(input_ids=ids, attention_mask=mask).logits

    mask = None if HAS_OPAQUE else torch.ones(1, 1, 16, 16).tril().bool()  # torch 2.8 cannot export how it is made
    batches = [torch.randint(0, 64, (2, 16)) for _ in range(6)]
    config = GPTQConfig(group_size=16, bits=3)
    layers: Any = prepare(copy.deepcopy(model), config)
    for ids in batches:
        layers(ids)
    graph: Any = prepare(Logits(model).eval(), config, example_inputs=(batches[0],))
    for ids in batches:
        graph(ids)
    want, have = quietly(layers, reference=True), quietly(graph, reference=True)
    with torch.no_grad():
        a, b = have(batches[0]), want(batches[0]).logits
    assert len(have.report.weights) == 3 * 7 and not have.report.notes
    assert float((a - b).norm() / b.norm()) < 1e-4


def chain(depth: int, rank: int) -> tuple[nn.Module, Tensor]:
    """Layers that hand `rank` directions on to each other, as trained ones do, and turn all others; and the first of
    these directions [WIDTH, rank]. Rounding a layer lets the next one see what the float model never showed."""

    def orthogonal(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(WIDTH, n))[0]

    first = directions = orthogonal(rank)
    layers = []
    for _ in range(depth):
        layer, to = nn.Linear(WIDTH, WIDTH, bias=False), orthogonal(rank)
        layer.weight.data = to @ directions.T + orthogonal(WIDTH) @ (torch.eye(WIDTH) - directions @ directions.T)
        layers, directions = [*layers, layer], to
    return nn.Sequential(*layers).eval(), first


def test_deep_models_are_better_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the average: single ones, and small random ones without such directions, differ by chance."""
    monkeypatch.setattr(in_sequence, "fast_dtype", lambda: torch.float32)
    with_, without = [], []
    for seed, rank in ((seed, rank) for seed in range(2) for rank in (1, 2, 4)):
        torch.manual_seed(seed)
        model, span = chain(12, rank)
        x = torch.randn(1024, rank) @ span.T
        prepared: Any = prepare(model, GPTQConfig(bits=3, group_size=-1), example_inputs=(x,), inplace=False)
        prepared(x)
        with_.append(error(convert(prepared, reference=True).graph, model, x))
        with monkeypatch.context() as patch:
            patch.setattr(graph_in_sequence, "LIMIT", -1)
            patch.setattr(graph_in_sequence.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
            without.append(error(quietly(prepared, reference=True).graph, model, x))
    assert sum(with_) < 0.97 * sum(without), (with_, without)


# ------------------------------------------------------------------------------------------------------------ the calls
def test_calls_compute_nothing_and_keep_copies() -> None:
    model, batches = made(), data()
    prepared = prepared_graph(model)
    result = prepared(batches[0])
    with pytest.raises(CalibrationError, match="calibration stops"):
        result + 1
    again = prepared_graph(model)
    for x in batches:
        used = x.clone()
        again(used)
        used.zero_()  # the caller fills the same memory with the next batch
    for x in batches[1:]:
        prepared(x)
    a, b = quietly(prepared), quietly(again)
    assert torch.equal(a(batches[0]), b(batches[0])) and error(a, model, batches[0]) < 0.5
    assert dict(a.report.timings)["calibrate"] > 0


def test_converted_twice_and_calibrated_on() -> None:
    model, batches = made(), data()
    before = copy.deepcopy(model.state_dict())
    prepared = prepared_graph(model, batches=batches[:2])
    first, second = quietly(prepared)(batches[0]), quietly(prepared)(batches[0])
    assert torch.equal(first, second)
    twin = copy.deepcopy(prepared)
    for x in batches[2:]:
        prepared(x)
    assert torch.equal(quietly(twin)(batches[0]), first)  # a copy has data of its own
    for x in batches[2:]:
        twin(x)
    more = quietly(prepared)(batches[0])
    assert not torch.equal(more, first) and torch.equal(quietly(twin)(batches[0]), more)
    assert torch.equal(quietly(prepared_graph(model, batches=batches))(batches[0]), more)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_prepared_model_usable(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from inc_graph.passes.qparams.gptq import GPTQ

    prepared = prepared_graph(made(), batches=data())
    want = quietly(prepared)(data()[0])
    solve, count = GPTQ.solve, 0

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise kind("enough")
        return solve(self, *args, **kwargs)

    monkeypatch.setattr(GPTQ, "solve", fails)
    with pytest.raises(BaseException, match="enough"):
        convert(prepared)
    monkeypatch.undo()
    assert torch.equal(quietly(prepared)(data()[0]), want)


def test_after_finalize_calibration_nothing_is_taken_in() -> None:
    model, batches = made(), data()
    prepared = prepared_graph(model)
    with pytest.raises(CalibrationError, match="seen no calibration data"):
        finalize_calibration(prepared)
    prepared(batches[0])
    finalize_calibration(prepared)
    assert torch.allclose(prepared(batches[1]), model(batches[1]), atol=1e-5)  # the float model
    want = quietly(prepared_graph(model, batches=batches[:1]))
    assert torch.equal(quietly(prepared)(batches[0]), want(batches[0]))


def test_bad_data() -> None:
    model, batches = made(), data()
    prepared = prepared_graph(model)
    with pytest.raises(CalibrationError, match="seen no calibration data"):
        convert(prepared)
    with pytest.raises(CalibrationError, match=r"an input of this calibration call, of shape \[24, 32\], holds NaN"):
        prepared(batches[0] * torch.nan)
    with pytest.raises(TypeError):
        prepared(batches[0], batches[0])
    for x in batches[:2]:
        prepared(x)  # what was refused does not count
    want = quietly(prepared_graph(model, batches=batches[:2]))(batches[0])
    assert torch.equal(quietly(prepared)(batches[0]), want)
    prepared(batches[2].index_fill(0, torch.tensor(0), torch.inf))
    with pytest.raises(CalibrationError, match="calibration call 3: its input holds NaN or infinity") as e:
        convert(prepared)
    assert e.value.module == "blocks.0.q"


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
