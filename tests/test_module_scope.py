"""Module scope: an eager model keeps its class, its methods and its control flow; only its layers are replaced."""

from __future__ import annotations

import copy
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inc_graph.quantization.captures as captures_module
from inc_graph.capture import capture
from inc_graph.errors import CaptureError, IncWarning
from inc_graph.quantization import QuantizedModel, StaticQuantConfig, convert, prepare, quantize
from inc_graph.quantization.leaf import Leaf
from tests.model_state import same, snapshot
from tests.module_scope_models import CONFIG, FLOAT, LAYERS, Block, Net, close, ids, modules


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# -------------------------------------------------------------------------------------------------- the whole model
@pytest.mark.parametrize("inplace", [True, False])
def test_every_layer_in_its_place(inplace: bool) -> None:
    model, data = Net().eval(), [ids() for _ in range(4)]
    want, before = [model(x) for x in data], snapshot(model)
    prepared = prepare(model, CONFIG, inplace)
    assert (prepared is model) == inplace and type(prepared) is Net
    assert all(torch.allclose(prepared(x), y, atol=1e-6) for x, y in zip(data, want, strict=True))
    halfway = snapshot(prepared)
    q = convert(prepared, inplace=inplace)
    assert (q is model) == inplace and type(q) is Net
    if not inplace:
        assert same(before, snapshot(model)) and same(halfway, snapshot(prepared))
    assert modules(q) == LAYERS and all(isinstance(q.get_submodule(p), Leaf) for p in LAYERS)
    assert all(close(y, q(x)) for x, y in zip(data, want, strict=True))
    assert q.predict(data[0]) == want[0][:, -1].argmax(-1).tolist()
    assert q(ids(1, 3), depth=1).shape == (1, 3, 16) and q(ids(9, 30)).shape == (9, 30, 16)


def test_convert_again_after_more_data() -> None:
    model, data = Net().eval(), ids()
    prepared = prepare(model, CONFIG, inplace=False)
    prepared(data)
    first = convert(prepared, inplace=False)
    assert torch.equal(convert(prepared, inplace=False)(data), first(data))
    narrow = first.conv.inner.report.to_json()
    for _ in range(5):
        prepared(ids())
    second = convert(prepared, inplace=False)
    assert not torch.equal(first(data), second(data)) and first.conv.inner.report.to_json() == narrow
    assert modules(second) == LAYERS


def test_the_report_is_on_the_model() -> None:
    model, data = Net().eval(), ids()
    before = sum(p.nbytes for p in model.parameters())
    q = quantize(model, CONFIG, lambda m: m(data))
    report = q.report
    assert report is model.report and (report.method, report.backend) == ("static_quant", "inductor")
    assert report.bytes_before == before and report.notes[0].startswith("quantized layer by layer")
    assert {(x.module, x.op, x.detail) for x in report.floats} == {
        (f"blocks.{i}.norm", "LayerNorm", "only Linear, Conv and Embedding are quantized layer by layer")
        for i in (0, 1)
    }
    assert {name for name, _ in report.timings} >= {"annotate", "convert-qdq", "lower"}

    class Reporter(Block):
        report = "mine"

    q = quantize(Reporter().eval(), CONFIG, lambda m: m(torch.randn(2, 16)))
    assert q.report == "mine" and q.quantization_report.count("linear") == 2


def test_settings_by_full_path_and_by_type() -> None:
    def left_float(config: StaticQuantConfig) -> set[str]:
        prepared = prepare(Net().eval(), config)
        return {p for p in LAYERS if not isinstance(prepared.get_submodule(p), Leaf)}

    assert left_float(StaticQuantConfig().set_local("blocks.0.fc1", FLOAT)) == {"blocks.0.fc1"}
    assert left_float(StaticQuantConfig().set_local(r"blocks\.\d\.fc2", FLOAT)) == {"blocks.0.fc2", "blocks.1.fc2"}
    assert left_float(StaticQuantConfig().set_local("blocks.1", FLOAT)) == {"blocks.1.fc1", "blocks.1.fc2"}
    assert left_float(StaticQuantConfig().set_local([nn.Embedding, nn.Conv1d], FLOAT)) == {"emb", "conv"}
    assert left_float(StaticQuantConfig().set_local(F.linear, FLOAT)) == {"emb", "conv"} ^ LAYERS
    assert left_float(StaticQuantConfig(white_list=["head", nn.Conv1d])) == LAYERS - {"head", "conv"}
    both = StaticQuantConfig().set_local(nn.Linear, FLOAT).set_local("head", CONFIG)
    assert left_float(both) == {p for p in LAYERS if "fc" in p}


def test_a_prefix_is_warned_about_here_too() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11))).eval()
    with pytest.warns(IncWarning, match=r"set_local\('1'\) also takes 10: ") as caught:
        prepare(model, StaticQuantConfig().set_local("1", StaticQuantConfig(act_algo="kl")))
    assert [w.filename for w in caught if issubclass(w.category, IncWarning)] == [__file__]


# ------------------------------------------------------------------------------------------------------- the leaves
def test_what_a_layer_has_still_answers() -> None:
    transformers = pytest.importorskip("transformers.pytorch_utils")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.emb, self.proj = nn.Linear(8, 4), nn.Embedding(6, 8), transformers.Conv1D(12, 4)
            self.conv = nn.Conv2d(3, 8, 3, stride=2, groups=1, bias=False)

        def forward(self, i: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.proj(self.fc(self.emb(i))), self.conv(image)

    model = Model().eval()
    model.fc.note = "mine"
    args = torch.randint(6, (3,)), torch.randn(1, 3, 9, 9)
    want, floats = model(*args), copy.deepcopy(model)
    prepared = prepare(model, CONFIG, inplace=False)
    prepared(*args)
    for m, tolerance in ((prepared, 0.0), (convert(prepared, inplace=False), 0.02)):
        assert (m.fc.in_features, m.fc.out_features, m.emb.embedding_dim, m.proj.nf) == (8, 4, 8, 12)
        assert (m.conv.stride, m.conv.groups, m.conv.kernel_size, m.conv.padding_mode) == ((2, 2), 1, (3, 3), "zeros")
        assert (
            m.fc.note == "mine" and m.conv.bias is None and not hasattr(m.fc, "nothing") and not hasattr(m.emb, "bias")
        )
        for name in ("fc.weight", "fc.bias", "emb.weight", "proj.weight", "proj.bias", "conv.weight"):
            path, _, attr = name.rpartition(".")
            a, b = floats.get_parameter(name), getattr(m.get_submodule(path), attr)
            assert a.shape == b.shape and a.dtype == b.dtype and (a - b).abs().max() <= tolerance, name
        for a, b in zip(want, m(*args), strict=True):
            assert close(a, b)


def test_inputs_of_any_rank() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 4), "emb": nn.Embedding(6, 4), "conv": nn.Conv2d(2, 3, 3)}).eval()
    inputs = {
        "fc": [(8,), (2, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8)],
        "emb": [(), (3,), (2, 3), (2, 3, 4), (0,)],
        "conv": [(2, 5, 5), (1, 2, 9, 6), (4, 2, 3, 3)],
    }
    floats = copy.deepcopy(model)
    prepared = prepare(model, CONFIG)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(6, shape) if name == "emb" else torch.randn(shape)

    data = [(n, draw(n, s)) for n, shapes in inputs.items() for s in shapes]
    for name, x in data:
        assert torch.allclose(prepared[name](x), floats[name](x), atol=1e-6)
    q = convert(prepared)
    for name, x in data:
        want, got = floats[name](x), q[name](x)
        assert want.shape == got.shape and (want.numel() == 0 or close(want, got, 25))
    assert torch.equal(q["emb"](torch.tensor([1, 2], dtype=torch.int32)), q["emb"](torch.tensor([1, 2])))


@pytest.mark.parametrize("kind", ["conv", "up"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(kind: str, dims: int) -> None:
    cls = getattr(nn, f"Conv{dims}d" if kind == "conv" else f"ConvTranspose{dims}d")
    options = {"padding": 2, "padding_mode": "circular"} if kind == "conv" else {"padding": 1, "output_padding": 1}
    model = nn.Sequential(cls(4, 6, 5, stride=2, **options)).eval()
    data = [torch.randn(2, 4, *(n,) * dims) for n in (6, 9)]
    want = [model(x) for x in data]
    q = quantize(model, CONFIG, lambda m: [m(x) for x in data])
    assert all(close(a, q(x)) for a, x in zip(want, data, strict=True)) and modules(q) == {"0"}


def test_a_call_with_more_than_the_input_keeps_the_layer_float() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.conv = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
            return self.conv(self.up(x, output_size=size) if size else self.up(x))

    model, x = Up().eval(), torch.randn(1, 4, 5, 5)
    want = model(x, [11, 11])
    prepared = prepare(model, CONFIG, inplace=False)
    prepared(x)
    plain = convert(prepared, inplace=False)
    with pytest.raises(CaptureError, match=r"called with more than its input.*'up'"):
        plain(x, [11, 11])
    prepared(x, [11, 11])
    q = convert(prepared)
    assert close(want, q(x, [11, 11])) and modules(q) == {"conv"}
    assert [x.detail for x in q.report.floats] == ["it is called with more than its input"]


def test_a_shared_layer_is_one_leaf() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
            self.again = nn.ModuleList([self.a, self.other])
            self.unused = self.other

        def forward(self, x: Tensor) -> Tensor:
            return self.again[0](F.relu(self.a(x))) + self.other(x)

    x = torch.randn(4, 8)
    for inplace in (True, False):
        model = Shared().eval()
        want = model(x)
        prepared = prepare(model, CONFIG, inplace)
        assert prepared.a is prepared.again[0] and isinstance(prepared.a, Leaf)
        prepared(x)
        q = convert(prepared, inplace=inplace)
        assert q.a is q.again[0] and q.other is q.unused and close(want, q(x))
        assert q.report.count("linear") == 2  # not five
    named = quantize(Shared().eval(), StaticQuantConfig().set_local("again.1", FLOAT), lambda m: m(x))
    assert modules(named) == {"a"}  # each of its names is its name


def test_tied_parameters_are_two_leaves_with_one_value() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.emb(x))

    model, x = Tied().eval(), ids()
    want = model(x)
    prepared = prepare(model, CONFIG, inplace=False)
    assert prepared.emb.weight is prepared.head.weight is not model.emb.weight
    prepared(x)
    q = convert(prepared)
    assert modules(q) == {"emb", "head"} and close(want, q(x)) and torch.allclose(q.emb.weight, q.head.weight)


def test_a_model_that_is_one_layer() -> None:
    """It cannot become another object in place: a leaf is given back, and the layer stays."""
    layer, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    before = snapshot(layer)
    prepared = prepare(layer, CONFIG)
    assert isinstance(prepared, Leaf) and torch.equal(prepared(x), layer(x))
    for inplace in (False, True):
        q = convert(prepared, inplace=inplace)
        assert isinstance(q, Leaf) and isinstance(q.inner, QuantizedModel) and close(layer(x), q(x))
        assert q.report.count("linear") == 1
    assert same(before, snapshot(layer))
    assert close(layer(x), quantize(layer, CONFIG, lambda m: m(x))(x))


# ------------------------------------------------------------------------------- layers that are left as they are
def test_layers_that_cannot_be_a_leaf_say_why() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
            return super().forward(x) + shift

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.own, self.patched = nn.Linear(8, 8), Own(8, 8), nn.Linear(8, 8)
            self.patched.forward = lambda x: x  # type: ignore[method-assign]
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.renormed = nn.Embedding(4, 8, max_norm=1.0)
            self.none = nn.Linear(0, 8)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.normed(self.patched(self.own(self.fine(x), shift=1.0)))
            x = x + self.renormed(torch.tensor([1])) + self.none(x[..., :0])
            return self.attn(x, x, x)[0]

    model, x = Model().eval(), torch.randn(2, 3, 8)
    want = model(x)
    q = quantize(model, CONFIG, lambda m: m(x))
    assert close(want, q(x)) and modules(q) == {"fine"}
    reasons = {
        "own": "its class Own has a forward of its own",
        "patched": "its class Linear has a forward of its own",
        "normed": "its weight is computed from other parameters at each call",
        "renormed": "max_norm changes its weight at each call",
        "none": "its weight is empty",
        "attn.out_proj": "MultiheadAttention reads its weight and never calls it",
        "attn": "only Linear, Conv and Embedding are quantized layer by layer",  # its in_proj_weight
    }
    assert reasons.items() <= {line.module: line.detail for line in q.report.floats}.items()


class Written(nn.Linear):
    """As Falcon's: the forward of `nn.Linear` in other words."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Adapted(Written):
    """An adapter that gives nothing yet: the numbers are those of a linear layer, and it is none."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Scaled(Written):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


def test_a_linear_layer_in_other_words_is_one() -> None:
    layers = OrderedDict(a=Written(8, 16), b=Written(16, 16, bias=False), c=Adapted(16, 16), d=Scaled(16, 4))
    model, x = nn.Sequential(layers).eval(), torch.randn(5, 8)
    q = quantize(model, CONFIG, lambda m: m(x))
    assert close(model(x), q(x)) and modules(q) == {"a", "b"} and isinstance(q.a, nn.Linear)
    kept = {line.module: line.detail for line in q.report.floats}
    assert kept == {n: f"its class {type(layers[n]).__name__} has a forward of its own" for n in "cd"}


def test_a_layer_that_cannot_be_captured_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_for_conv(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(module, nn.Conv1d):
            raise CaptureError("by design", hint="none")
        return capture(module, *args, **kwargs)

    monkeypatch.setattr(captures_module, "capture", fails_for_conv)
    with pytest.warns(IncWarning, match=r"layer 'conv' stays float: by design \[module 'conv'\]"):
        prepared = prepare(Net().eval(), CONFIG)
    prepared(ids())
    q = convert(prepared)
    assert modules(q) == LAYERS - {"conv"} and isinstance(q.conv, nn.Conv1d)
    assert "it cannot be captured: by design" in [x.detail for x in q.report.floats]


def test_layers_never_called_stay_float_with_a_warning() -> None:
    model, x = Net().eval(), ids()
    model.extra = nn.Linear(3, 3).eval()
    extra, fc1 = model.extra, model.blocks[1].fc1
    prepared = prepare(model, CONFIG)
    prepared(x, depth=1)
    with pytest.warns(
        IncWarning, match=r"^3 layers saw no .* stay float: blocks.1.fc1, blocks.1.fc2, extra$"
    ) as caught:
        q = convert(prepared)
    assert [w.filename for w in caught if issubclass(w.category, IncWarning)] == [__file__]
    assert q.extra is extra and q.blocks[1].fc1 is fc1  # the user's own layers are back
    assert {x.module for x in q.report.floats if "no calibration data reached it" in x.detail} == {
        "blocks.1.fc1", "blocks.1.fc2", "extra",
    }  # fmt: skip
    assert modules(q) == LAYERS - {"blocks.1.fc1", "blocks.1.fc2"}


@pytest.mark.parametrize("decoder", [False, True])
def test_torch_transformer_layers_are_called(decoder: bool) -> None:
    """Its fused inference path would read the weights and call no layer."""
    if decoder:
        model: nn.Module = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 2).eval()
        args: tuple[Tensor, ...] = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
        kwargs = {}
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
        args = (torch.randn(2, 5, 16),)
        kwargs = {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}
    want, before = model(*args), snapshot(model)
    prepared = prepare(model, CONFIG, inplace=False)
    prepared(*args, **kwargs)
    q = convert(prepared)
    assert close(want, q(*args)) and q(*args, **kwargs).shape == want.shape
    assert modules(q) == {f"layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)}
    with pytest.raises(ZeroDivisionError):
        quantize(model, CONFIG, lambda m: 1 / 0)
    assert same(before, snapshot(model)) and torch.equal(model(*args), want)


# ------------------------------------------------------------------------------------------------------- transformers
def test_a_language_model_keeps_generate() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 64, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **options)
    prepared = prepare(model, CONFIG, inplace=False)
    assert torch.equal(prepared.generate(prompt, **options), want)  # calibration is generation
    q = convert(prepared)
    assert type(q) is type(model) and q.report.count("linear") == 15 and q.report.count("embedding") == 1
    assert close(model(prompt).logits, q(prompt).logits, 25)
    got = q.generate(prompt, **options)
    assert got.shape[0] == 2 and got.shape[1] > 5 and torch.equal(got[:, :5], prompt)
    assert q.generate(prompt, **options, num_beams=2).shape[0] == 2
    assert q.device.type == "cpu" and q.get_input_embeddings() is q.model.embed_tokens


# -------------------------------------------------------------------------------------------------------------- speed
@pytest.mark.alone
def test_equal_layers_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return capture(*args, **kwargs)

    monkeypatch.setattr(captures_module, "capture", counted)
    layers = [nn.Linear(8, 8) for _ in range(12)] + [nn.Linear(8, 8, bias=False), nn.Linear(8, 4)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(4, 8)
    want, start = model(x), time.perf_counter()
    prepared = prepare(model, CONFIG)
    assert count == 2 and time.perf_counter() - start < 10
    prepared(x)
    q = convert(prepared)
    assert q.report.count("linear") == 14 and close(want, q(x), 15)
    assert len({id(leaf.inner) for leaf in q}) == 14
