"""Exported graphs whose layers are rounded in sequence, each on what the rounded ones before it give."""

from __future__ import annotations

import copy
import gc
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
from inc_graph.errors import CalibrationError, IncError
from inc_graph.lowering._onednn import HAS_OPAQUE
from inc_graph.quantization import (
    GPTQConfig,
    convert,
    finalize_calibration,
    graph_in_sequence,
    prepare,
)
from inc_graph.quantization.kept_calls import flat_inputs
from inc_graph.side_by_side import SideBySide, why_not
from inc_graph.weights import Gram
from tests.graph_generator import KINDS, RandomModel
from tests.weight_only import sequence_models
from tests.weight_only.sequence_models import (
    WIDTH,
    data,
    error,
    float_weights,
    made,
    prepared_graph,
    products,
    quietly,
)

computed, grams = sequence_models.computed, sequence_models.grams  # fixtures


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
    with pytest.raises(CalibrationError, match=r"calibration call 1: input 'x', of shape \[24, 32\], holds NaN"):
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
