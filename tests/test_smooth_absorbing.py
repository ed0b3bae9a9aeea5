"""SmoothQuant of models that are not exported: who before a layer takes its scale in, and when nobody may."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.errors import IncWarning
from inc_graph.quantization import (
    DynamicQuantConfig,
    GPTQConfig,
    RTNConfig,
    SmoothQuantConfig,
    StaticQuantConfig,
    convert,
    kinds_of_calls,
    load,
    module_scope,
    prepare,
    quantize,
    save,
)
from inc_graph.quantization.absorbing import _originals, absorbing
from inc_graph.quantization.layers import leaves
from inc_graph.smooth_report import SmoothLine
from tests.smooth_models import Attention, Gated, outliers

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
SMOOTH = SmoothQuantConfig(alpha=0.6)


class Block(nn.Module):
    """A block of a language model."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(size), Attention(size), Gated(size, 24)
        with torch.no_grad():
            self.norm.weight.copy_(outliers(size))
            self.mlp.norm.weight.copy_(outliers(size, 1))
            for norm, layer in (  # whose weights are small for them, as those of trained models
                *((self.norm, getattr(self.attention, name)) for name in "qkv"),
                *((self.mlp.norm, layer) for layer in (self.mlp.gate, self.mlp.up)),
            ):
                layer.weight /= norm.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Blocks(nn.Module):
    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.tail = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.tail(x)


class Python(Blocks):
    """Asks a tensor which way to go: this cannot be exported, its blocks can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


def make(kind: Any = Blocks, *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args).eval()


def run(model: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        for row in x.split(2):
            model(row)


def lines(model: Any) -> dict[str, SmoothLine]:
    return {name: line for line in model.report.smoothing for name in line.layers}


@torch.no_grad()
def error(q: nn.Module, model: nn.Module, x: Tensor = X) -> float:
    return float((q(x) - model(x)).norm() / model(x).norm())


PAIRS = {"attention.q": "norm", "attention.k": "norm", "attention.v": "norm", "attention.o": "attention.v",
         "mlp.gate": "mlp.norm", "mlp.up": "mlp.norm", "mlp.down": "mlp.up"}  # fmt: skip


@pytest.mark.parametrize("kind", [Blocks, Python])
def test_every_pair_is_found(kind: Any) -> None:
    model = make(kind, 2)
    q = quantize(copy.deepcopy(model), SMOOTH, run)
    found = lines(q)
    for block in ("layers.0", "layers.1"):
        for layer, taker in PAIRS.items():
            line = found[f"{block}.{layer}"]
            assert line.by == "absorbed" and line.takers == (f"{block}.{taker}",), line
    assert found["layers.0.attention.q"].layers == tuple(f"layers.0.attention.{x}" for x in "qkv")
    head = found["tail.1"]  # behind the blocks: the whole model would have to be exported
    assert (head.by, head.takers) == (("absorbed", ("tail.0",)) if kind is Blocks else ("multiplied", ()))
    assert len(q.report.smoothing) == 9 and type(q) is kind
    assert sum("the model cannot be exported" in note for note in q.report.notes) == (kind is Python)
    assert kind is Blocks or "the model cannot be exported" in head.detail
    assert error(q, model) < 0.6 * error(quantize(copy.deepcopy(model), StaticQuantConfig(), run), model)
    assert not any(m._forward_pre_hooks or "_inc_first_call" in vars(m) for m in q.modules())


@pytest.mark.parametrize("kind", [Blocks, Python])
def test_the_float_function_stays_and_is_put_back(kind: Any) -> None:
    model = make(kind, 2)
    want, before = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    prepared = prepare(model, SmoothQuantConfig(alpha=0.8))
    run(prepared)
    found = leaves(prepared)
    facts = prepared.__dict__[module_scope._MARK]
    graphs = {leaf: leaf.inner for leaf in found}

    def again(leaf: Any) -> Any:
        return copy.copy(leaf.inner)

    with absorbing(prepared, found, facts.recipe, again, keep=False), _originals(prepared, found), torch.no_grad():
        got = prepared(X)
        changed = [k for k, v in prepared.state_dict().items() if not torch.equal(v, before[k])]
        assert len(changed) >= 2 * 9
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert {leaf: leaf.inner for leaf in found} == graphs
    float_again = module_scope.undo(prepared)
    assert all(torch.equal(v, before[k]) for k, v in float_again.state_dict().items())


@pytest.mark.slow
def test_as_in_a_graph() -> None:
    model = make()
    eager = quantize(copy.deepcopy(model), SMOOTH, run, backend="eager")
    graph: Any = quantize(model, SMOOTH, run, example_inputs=(X[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    a, b = lines(eager), lines(graph)
    assert a.keys() == b.keys()
    for name, line in a.items():
        assert (line.by, line.takers, line.layers) == (b[name].by, b[name].takers, b[name].layers)
        assert line.largest == pytest.approx(b[name].largest, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [RTNConfig(bits=8, group_size=-1), GPTQConfig(bits=8, group_size=-1), DynamicQuantConfig(),
     StaticQuantConfig(act_dtype="int8", act_sym=True, act_algo="percentile")],
    ids=lambda c: c.name,
)  # fmt: skip
def test_composed(other: Any) -> None:
    model = make()
    q: Any = quantize(copy.deepcopy(model), SMOOTH + other, run)
    assert {line.by for line in q.report.smoothing} == {"absorbed"}
    assert error(q, model) < 0.1


@pytest.mark.slow
def test_a_search_for_alpha() -> None:
    model = make()
    q: Any = quantize(copy.deepcopy(model), SmoothQuantConfig(alpha="auto"), run)
    assert error(q, model) < 0.6 * error(quantize(copy.deepcopy(model), StaticQuantConfig(), run), model)
    assert q.report.smoothing.count("absorbed") >= 2
    assert all(line.error is not None for line in q.report.smoothing)
    q = quantize(make(), SmoothQuantConfig(alpha="auto", do_blockwise=True), run)
    assert len({line.alpha for line in q.report.smoothing if line.layers[0].startswith("layers.0")}) == 1


def test_a_copy_leaves_the_model_as_it_was() -> None:
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prepared = prepare(copy.deepcopy(model), SMOOTH)
    run(prepared)
    one, two = (convert(prepared, inplace=False) for _ in range(2))  # it can be converted again
    assert torch.equal(one(X), two(X)) and lines(one) == lines(two)
    float_again = module_scope.undo(prepared)
    assert all(torch.equal(v, before[k]) for k, v in float_again.state_dict().items())
    assert not any(m._forward_pre_hooks for m in float_again.modules())


def test_a_failure_leaves_it_as_it_was_too(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(make(), SMOOTH)
    run(prepared)
    with torch.no_grad():
        want = prepared(X)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(module_scope, "finish", broken)
        with pytest.raises(RuntimeError, match="broken"):
            convert(prepared)
    with torch.no_grad():
        assert torch.equal(prepared(X), want)
    assert lines(convert(prepared))["layers.0.attention.o"].by == "absorbed"


@pytest.mark.slow
def test_saved_and_loaded(tmp_path: Path) -> None:
    q: Any = quantize(make(), SMOOTH, run)
    save(q, tmp_path)
    loaded = load(tmp_path, make())
    with torch.no_grad():
        assert torch.equal(loaded(X), q(X))
    assert lines(loaded) == lines(q)


class Experts(nn.Module):
    """A norm that one expert reads now, and another one at another time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.first(y) if len(x) < 100 else self.second(y)


class Twice(nn.Module):
    """A layer that is called twice, behind two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.layer = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.b(self.layer(self.a(x))))


class Tied(nn.Module):
    """An output layer with the weight of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 20, False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x.long().sum(-1).abs() % 20)))


class PostNorm(nn.Module):
    """The norm's result is read by a sum, too: in a graph it would be computed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.layer(y)


class Shown(nn.Module):
    """Shows an export something else than what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.layer(y)
        return z if torch.compiler.is_exporting() else z + y


class InBlocks(nn.Module):
    """The one block of a model."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)  # type: ignore[no-any-return]


class Branch(nn.Module):
    """Shows the norm's result to somebody else, but not when it is called with what the first call brings."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(y) if x.shape[0] > 1 else self.head(y) + y


class Base(nn.Module):
    """As models of transformers: a base, which has a use of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Identity(), nn.LayerNorm(16))
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "layer", "why"),
    [
        (Experts, "first", "did not use layers.0.second"),
        (Twice, "layer", "several times"),
        (Tied, "head", "is read in other ways"),
        (PostNorm, "layer", "read by add"),
        (Shown, "layer", "results of the model would be others"),
        (Branch, "", "others than its block may read"),
        (Base, "", "others than its block may read"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*layers saw no calibration data.*", "ignore:.*tied.*")
def test_what_may_not_be_scaled_is_multiplied(kind: Any, layer: str, why: str) -> None:
    model = make(InBlocks, kind) if layer else make(kind)
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", ".a.weight", ".b.weight")):
            p.data.copy_(outliers(16))
    q = quantize(copy.deepcopy(model), SMOOTH, run)
    line = lines(q)[f"layers.0.{layer}" if layer else "head"]
    assert line.by == "multiplied" and why in line.detail, line
    assert error(q, model) < 0.1
    if kind is Branch:  # takes another way with more rows
        assert error(q, model, X[:1]) < 0.1
    if kind is Base:  # is used without its head
        with torch.no_grad():
            want, got = model.base(X), q.base(X)
        assert torch.equal(want, got)
    assert all(torch.equal(m.weight, q.get_submodule(n).weight) for n, m in model.named_modules() if "norm" in n)
    if kind is Experts:
        many = X.repeat(26, 1, 1)
        assert error(q, model, many) < 1e-5  # the other one, which is float
    if kind is Shown:
        assert any(why in note for note in q.report.notes)


class Ways(nn.Module):
    """A block that adds the norm's value where `when` says so of its input."""

    def __init__(self, when: Any) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.when = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16), when
        with torch.no_grad():
            self.norm.weight.copy_(outliers(16))

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y = self.norm(x)
        z = x + self.b(F.relu(self.a(y)))
        return z + y if self.when(x, more) else z


class Row(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x, more=more)
        return x


def never(x: Tensor, more: bool) -> bool:
    return False


WAYS: dict[str, tuple[Any, list[Any]]] = {
    "a step": (lambda x, more: x.shape[1] == 1, [(X, False), (X[:, :1], False)]),
    "a step first": (lambda x, more: x.shape[1] == 1, [(X[:, :1], False), (X, False)]),
    "a step that was not seen": (lambda x, more: x.shape[1] == 1, [(X, False), (X[:, :1], None)]),
    "a sample that was not seen": (lambda x, more: len(x) == 1, [(X, False), (X[:1], None)]),
    "many steps": (lambda x, more: x.shape[1] > 3, [(X[:, :3], False), (X[:, :2], False), (X, False)]),
    "a flag": (lambda x, more: more, [(X, False), (X, True)]),
    "a dtype": (lambda x, more: x.dtype is torch.float64, [(X, False)]),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_block_that_takes_another_way_in_another_call(name: str) -> None:
    when, calls = WAYS[name]
    torch.manual_seed(0)
    model = Row(Ways(never), Ways(when)).eval()

    def calibrate(m: nn.Module) -> None:
        for x, more in calls:
            if more is not None:
                m(x, more=more)

    with torch.no_grad():
        q = quantize(copy.deepcopy(model), SMOOTH, calibrate)
        for x, more in calls:
            want, got = model(x, more=bool(more)), q(x, more=bool(more))
            assert (got - want).norm() < 0.1 * want.norm()
    found = lines(q)
    assert found["layers.0.a"].by == found["layers.0.b"].by == "absorbed"
    if name == "a dtype":  # which no call has
        assert found["layers.1.a"].by == found["layers.1.b"].by == "absorbed"
        return
    line = found["layers.1.a"]
    assert line.by == "multiplied"
    assert "the results of layers.1 would be others, for inputs of sizes" in line.detail or "read by" in line.detail
    if len(calls) > 1 and name != "many steps" and "first" not in name:
        assert any("the results of layers.1 would be others" in note for note in q.report.notes)


def test_more_kinds_of_calls_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_of_calls, "_KINDS", 2)
    torch.manual_seed(0)
    model = Row(Ways(never), Ways(never)).eval()

    def calibrate(m: nn.Module) -> None:
        for x in (X, X[:1], X[:, :1]):
            m(x)

    line = lines(quantize(model, SMOOTH, calibrate))["layers.1.a"]
    assert line.by == "multiplied" and "called in more ways than were kept" in line.detail


def test_trying_a_model_leaves_its_buffers() -> None:
    class Counting(Ways):
        def __init__(self) -> None:
            super().__init__(never)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, more: bool = False) -> Tensor:
            self.calls += 1
            return super().forward(x, more)

    model = Row(Counting(), Counting()).eval()
    q = quantize(model, SMOOTH, lambda m: [m(X), m(X[:2])])
    assert lines(q)["layers.0.a"].by == "absorbed" and float(q.layers[0].calls) == 2


def test_batch_norms_behind_a_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.ReLU()
    ).eval()
    with torch.no_grad():
        model[1].weight.copy_(outliers(8))
    x = torch.randn(4, 3, 12, 12)
    q = quantize(copy.deepcopy(model), SMOOTH, lambda m: run(m, x))
    assert lines(q)["4"].takers == ("1",) and lines(q)["0"].by == "multiplied"
    assert error(q, model, x) < 0.05


@pytest.mark.slow
def test_a_float_layer_takes_scales_in_too() -> None:
    config = SmoothQuantConfig(alpha=0.6).set_local("0.mlp.up", SmoothQuantConfig(w_dtype="fp32"))
    config = config.set_local("0.attention.v", StaticQuantConfig())
    model = nn.Sequential(make(Block)).eval()
    q = quantize(copy.deepcopy(model), config, run)
    found = lines(q)
    assert found["0.mlp.down"].takers == ("0.mlp.up",) and "0.mlp.up" in {line.module for line in q.report.floats}
    assert found["0.mlp.gate"].by == "multiplied"  # `up` reads the same value, and is not smoothed
    assert error(q, model) < 0.05


@pytest.mark.slow
def test_a_model_that_is_never_called_itself() -> None:
    model = make(Blocks, 2)

    def parts(m: nn.Module) -> None:
        with torch.no_grad():
            x = X
            for layer in m.layers:  # type: ignore[union-attr]
                x = layer(x)
            m.tail(x)  # type: ignore[operator]

    found = lines(quantize(copy.deepcopy(model), SMOOTH, parts))
    assert found["layers.1.mlp.down"].by == "absorbed" and found["tail.1"].by == "multiplied"


def test_nothing_that_can_be_exported() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return F.relu(self.layer(y)) if float(y.sum()) > -1e9 else y

    model = make(Alone)
    q: Any = quantize(copy.deepcopy(model), SMOOTH, run)
    assert lines(q)["layer"].by == "multiplied"
    assert any("cannot be exported to look at it" in note for note in q.report.notes)
    with pytest.warns(IncWarning, match="folding=True smooths nothing layer by layer: layer; .*cannot be exported"):
        q = quantize(copy.deepcopy(model), SmoothQuantConfig(alpha=0.6, folding=True), run)
    assert lines(q)["layer"].by == "left"
    with warnings.catch_warnings():
        warnings.simplefilter("error", IncWarning)
        q = quantize(make(), SmoothQuantConfig(alpha=0.6, folding=True), run)
    assert {line.by for line in q.report.smoothing} == {"absorbed"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = make().to(dtype), X.to(dtype)
    q: Any = quantize(copy.deepcopy(model), SMOOTH, lambda m: run(m, x))
    assert {line.by for line in q.report.smoothing} == {"absorbed"}
    assert error(q, model, x) < 0.1


@pytest.mark.slow
def test_a_language_model_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make(LlamaForCausalLM, LlamaConfig(**sizes, intermediate_size=48, vocab_size=50))
    for layer in model.model.layers:
        for norm, after in ((layer.input_layernorm, "qkv"), (layer.post_attention_layernorm, ("gate", "up"))):
            norm.weight.data.copy_(outliers(32))
            for name in after:
                part = layer.self_attn if name in "qkv" else layer.mlp
                part.get_submodule(f"{name}_proj").weight.data /= norm.weight
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)

    def calibrate(m: Any) -> None:
        m.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
        m(ids)  # the output head has seen the last tokens only

    q: Any = quantize(copy.deepcopy(model), SMOOTH, calibrate)
    pairs = {("q_proj", "k_proj", "v_proj"): "input_layernorm", ("o_proj",): "v_proj", ("down_proj",): "up_proj",
             ("gate_proj", "up_proj"): "post_attention_layernorm"}  # fmt: skip
    assert len(q.report.smoothing) == 9
    for line in q.report.smoothing:
        ends = tuple(name.rpartition(".")[2] for name in line.layers)
        assert (line.by == "multiplied") == (ends == ("lm_head",))  # its norm is the end of the base model
        assert line.by == "multiplied" or line.takers[0].endswith(pairs[ends])
    with torch.no_grad():
        hidden, ours = model.model(ids)[0], q.model(ids)[0]
    assert float((hidden - ours).norm() / hidden.norm()) < 0.1
    with torch.no_grad():
        want, got = model(ids).logits, q(ids).logits
    assert type(q) is LlamaForCausalLM and float((got - want).norm() / want.norm()) < 0.03
    assert q.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0).shape == (2, 14)


def test_conv1d_of_transformers_is_multiplied_and_calibrated() -> None:
    """Its graph looks at its input through a view: the rows that are kept are those of the view, too."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(24, 16), nn.GELU(), conv1d(8, 24)).eval()
    x = X * outliers(16)
    for config in (SMOOTH, SmoothQuantConfig(alpha="auto")):
        with torch.no_grad():
            q = quantize(model, config, lambda m: m(x), inplace=False)
            assert 20 * torch.log10(model(x).norm() / (model(x) - q(x)).norm()) > 25
        assert [line.by for line in q.report.smoothing] == ["multiplied"] * 2
