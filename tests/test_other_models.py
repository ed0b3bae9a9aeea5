"""The same bar for models that nobody tuned for: each runs quantized, close to float, and the report hides nothing.

Weights are random (seeded) and models small, so the bound on the signal-to-noise ratio is that of the arithmetic, not
of a training: 8 bits over a range that fits give 40 to 45 dB for one layer (6.02 dB a bit, less the peak-to-rms ratio
of the data), and n layers in a row add their noise, some 10 log10(n) dB. 36 to 49 dB are measured here; 33 are asked
for. A wrong scale, a lost bias or a swapped axis gives 0 to 15.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from inc_graph.export import export
from inc_graph.oppattern import pattern_of
from inc_graph.ops import is_inc
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.report import Report

pytestmark = pytest.mark.slow

LAYERS = (
    "linear",
    "embedding",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
aten = torch.ops.aten
MOVES = (operator.getitem, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.chunk.default)
DYNAMIC = torch.export.Dim.DYNAMIC


def sqnr(want: Any, got: Any) -> float:
    """Signal to noise in dB over all float outputs together."""
    a, b = (
        [
            t.detach().double().flatten()
            for t in pytree.tree_leaves(v)
            if isinstance(t, Tensor) and t.is_floating_point()
        ]
        for v in (want, got)
    )
    x, y = torch.cat(a), torch.cat(b)
    return float("inf") if torch.equal(x, y) else float(10 * torch.log10((x**2).sum() / ((x - y) ** 2).sum()))


def kernels(report: Report) -> dict[str, int]:
    """Layers that run in int8 kernels, by type (sums that were fused into one are not counted)."""
    return {op: n for op, n in Counter(line.op for line in report.kernels).items() if op in LAYERS}


def floats(node: fx.Node) -> bool:
    """Whether a node holds float values that are not constants."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return node.op != "get_attr" and any(isinstance(v, Tensor) and v.is_floating_point() for v in values)


def nothing_hidden(q: Any) -> None:
    """Every operator that makes floats of floats is in the report, or only moves values, or follows one that is."""
    report = q.report
    named = {line.name for line in (*report.kernels, *report.reference, *report.floats)}
    assert all(line.detail for line in (*report.kernels, *report.reference, *report.floats))
    for node in q.graph.graph.nodes:
        if node.op != "call_function" or is_inc(node) or node.name in named or not floats(node):
            continue
        pattern = pattern_of(node)
        follows = node.target in MOVES or (pattern is not None and pattern.role in ("carrier", "activation"))
        assert follows or not any(map(floats, node.all_input_nodes)), node.format_node()


def check(
    model: nn.Module,
    make: Callable[[], tuple[Any, ...]],
    expect: dict[str, int],
    *,
    bound: float = 33,
    config: Any = None,
    dynamic_shapes: Any = None,
    kwargs: dict[str, Any] | None = None,
    exported: bool = True,
) -> Any:
    """Quantize on 4 batches of `make` and compare with the float model on them; `expect` counts int8 kernels by type.

    The batches compared are those calibrated on: the arithmetic is tested, not whether 4 batches cover a range.
    """
    model.eval()
    kwargs = kwargs or {}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    data = [make() for _ in range(4)]
    inputs = {"example_inputs": kwargs or data[0], "dynamic_shapes": dynamic_shapes} if exported else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none of these models is one to warn about
        warnings.filterwarnings("ignore", message=".*(quantize_per_tensor|nested tensors|batch_first|_flat_weights).*")
        prepared = prepare(model, config or StaticQuantConfig(), inplace=False, **inputs)
        with torch.no_grad():
            for x in data:
                prepared(*x, **kwargs)
            q = convert(prepared)
            want, got = [model(*x, **kwargs) for x in data], [q(*x, **kwargs) for x in data]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items()), "the user's model was changed"
    assert pytree.tree_structure(want) == pytree.tree_structure(got)
    for a, b in zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True):
        if isinstance(a, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    print(f"{type(model).__name__}: {sqnr(want, got):.1f} dB, {kernels(q.report)}")
    print(q.report)
    assert kernels(q.report) == expect
    assert sqnr(want, got) > bound
    if exported:
        nothing_hidden(q)
    return q


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rand(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape),)


# ----------------------------------------------------------------------------------------------------- recurrent
class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 32)
        self.inp = nn.Linear(32, 32)
        self.rnn = kind(32, 32, batch_first=True, **options)
        self.out = nn.Linear(32 * (2 if options.get("bidirectional") else 1), 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rnn(torch.relu(self.inp(self.emb(ids))))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep"])
def test_recurrent(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    q = check(Recurrent(kind, **options), lambda: (torch.randint(50, (4, 12)),), {"embedding": 1, "linear": 2})
    (line,) = [x for x in q.report.floats if x.module == "rnn"]
    assert line.op == kind.__name__.lower() and "recurrent state" in line.detail


class Cell(nn.Module):
    """A loop over time in Python: unrolled by the exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 16)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.out(h)


def test_lstm_cell_in_a_loop() -> None:
    q = check(Cell(), rand(4, 3, 16), {"linear": 1})
    assert {x.op for x in q.report.floats if x.module == "cell"} >= {"lstm_cell"}


# -------------------------------------------------------------------------------------------------- convolutions
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int) -> None:
    conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
    model = nn.Sequential(
        conv(4, 16, 3, padding=1), nn.ReLU(), conv(16, 16, 3, stride=2, padding=1, groups=4), nn.ReLU(),
        up(16, 8, 2, stride=2), nn.ReLU(), conv(8, 4, 3, dilation=2, padding="same"),
        up(4, 4, 3, padding=1, bias=False),
    )  # fmt: skip
    check(model, rand(2, 4, *(8,) * dims), {f"conv{dims}d": 3, f"conv_transpose{dims}d": 2})


def test_grouped_transposed_convolution_stays_float() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2))
    q = check(model, rand(2, 4, 8, 8), {"conv2d": 1})
    assert [x.detail for x in q.report.floats] == [
        "grouped transposed convolution: its output channels lie on two weight dimensions"
    ]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = self.block(3, 16)
        self.down2 = self.block(16, 32)
        self.mid = self.block(32, 32)
        self.up2 = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.dec2 = self.block(64, 16)
        self.dec1 = self.block(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    @staticmethod
    def block(n: int, m: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
            nn.Conv2d(m, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.mid(F.max_pool2d(b, 2))
        d = self.dec2(torch.cat([self.up2(c), b], 1))
        e = self.dec1(torch.cat([F.interpolate(d, scale_factor=2, mode="nearest"), a], 1))
        return self.head(e)


def test_unet() -> None:
    q = check(UNet(), rand(1, 3, 16, 16), {"conv2d": 11, "conv_transpose2d": 1})
    assert not any(x.op == "cat" for x in q.report.floats)


class BasicBlock(nn.Module):
    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m)
        self.conv2, self.bn2 = nn.Conv2d(m, m, 3, 1, 1, bias=False), nn.BatchNorm2d(m)
        self.down = (
            nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m)) if stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += self.down(x)
        return F.relu(y)


def test_resnet() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), BasicBlock(16, 16, 1), BasicBlock(16, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    q = check(model, rand(2, 3, 16, 16), {"conv2d": 6, "linear": 1})
    assert sum(x.op == "add" for x in q.report.kernels) >= 1


class SqueezeExcite(nn.Module):
    def __init__(self, n: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(n, n // 4, 1), nn.Conv2d(n // 4, n, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(F.relu(self.reduce(x.mean([2, 3], keepdim=True)))))


class MBConv(nn.Module):
    """Inverted residual with squeeze-excitation: MobileNetV3 (hardswish, hardsigmoid), EfficientNet (silu, sigmoid)."""

    def __init__(self, n: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        m = 4 * n
        self.body = nn.Sequential(
            nn.Conv2d(n, m, 1, bias=False), nn.BatchNorm2d(m), act(),
            nn.Conv2d(m, m, 5, padding=2, groups=m, bias=False), nn.BatchNorm2d(m), act(),
            SqueezeExcite(m, gate()), nn.Conv2d(m, n, 1, bias=False), nn.BatchNorm2d(n),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@pytest.mark.parametrize(
    "names", [("Hardswish", "Hardsigmoid"), ("SiLU", "Sigmoid")], ids=["mobilenet", "efficientnet"]
)
def test_inverted_residual(names: tuple[str, str]) -> None:
    act, gate = (getattr(nn, n) for n in names)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), act(), MBConv(8, act, gate), MBConv(8, act, gate))
    check(model, rand(2, 3, 16, 16), {"conv2d": 11})


def test_group_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.PReLU(), nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    q = check(model, rand(2, 3, 8, 8), {"conv2d": 3})
    assert any("group_norm" in x.op for x in q.report.floats)


# ------------------------------------------------------------------------------------------------------ attention
def test_torch_transformer() -> None:
    """The module of torch, encoder and decoder: self and cross attention, layer norms before and after."""
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    q = check(model, lambda: (torch.randn(2, 7, 32), torch.randn(2, 5, 32)), {"linear": 22})
    assert not [x for x in q.report.floats + q.report.reference if x.op == "linear"]


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True, **options)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        z, weights = self.attn(x, y, y, key_padding_mask=mask, average_attn_weights=False)
        return self.out(z), weights


@pytest.mark.parametrize("options", [{}, {"kdim": 24, "vdim": 24}], ids=["packed", "separate"])
def test_multihead_attention(options: dict[str, Any]) -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    width = options.get("kdim", 32)
    check(
        Attend(**options),
        lambda: (torch.randn(2, 7, 32), torch.randn(2, 5, width), mask),
        {"linear": 5 if options else 4},
    )


class Biased(nn.Module):
    """Attention with a trained mask, as a plain parameter or as the table of relative positions of Swin."""

    def __init__(self, relative: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.randn(7, 7))
        self.table = nn.Parameter(torch.randn(13, 4))
        steps = torch.arange(7)
        self.register_buffer("index", steps[:, None] - steps[None] + 6)
        self.relative = relative

    def forward(self, x: Tensor) -> Tensor:
        if not self.relative:
            return self.attention(x, x, x, attn_mask=self.bias, need_weights=False)[0]
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(7, 7, 4).permute(2, 0, 1).contiguous()
        y = F.scaled_dot_product_attention(q, k, v, bias[None])
        return self.out(y.transpose(1, 2).contiguous().view(x.shape))


@pytest.mark.parametrize("relative", [False, True])
def test_attention_with_a_trained_mask(relative: bool) -> None:
    model, x = Biased(relative).eval(), torch.randn(2, 7, 32)
    graph = export(model, (x,))
    prepared = prepare(graph, StaticQuantConfig(), inplace=False)
    for run in (graph, prepared):  # autograd chooses another kernel than no_grad
        torch.testing.assert_close(run(x), model(x))
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x))
    q = convert(prepared)
    for context in (torch.no_grad(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH)):
        with context:
            assert sqnr(model(x), q(x)) > 33 and sqnr(model(x), q.graph(x)) > 33


def test_t5_with_gradients_on() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, use_cache=False
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(1, 50, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    graph = export(model, inputs)
    torch.testing.assert_close(graph(**inputs)["logits"], model(**inputs)["logits"])
    prepared = prepare(graph, StaticQuantConfig())
    prepared(**inputs)
    assert sqnr(model(**inputs)["logits"], convert(prepared)(**inputs)["logits"]) > 25


class CrossAttention(nn.Module):
    """In the manner of HF models: separate projections, a float mask that is added, matmuls written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, *, context: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            f(t).view(t.shape[0], -1, 4, 8).transpose(1, 2)
            for f, t in ((self.q, x), (self.k, context), (self.v, context))
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / 8**0.5 + mask
        y = torch.matmul(scores.softmax(-1), v).transpose(1, 2)
        return self.o(y.reshape(*y.shape[:2], 32))


def test_cross_attention() -> None:
    mask = torch.zeros(2, 1, 1, 9)
    mask[0, ..., 6:] = torch.finfo(torch.float32).min

    def make() -> dict[str, Any]:
        return {"x": torch.randn(2, 4, 32), "context": torch.randn(2, 9, 32), "mask": mask}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = CrossAttention()

        def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
            return self.inner(x, context=context, mask=mask)

    q = check(Wrapped(), lambda: tuple(make().values()), {"linear": 4})
    assert {x.detail for x in q.report.floats if x.op == "matmul"} == {
        "backend 'inductor' has no quantized kernel for matmul"
    }
    config = StaticQuantConfig().set_local(torch.matmul, StaticQuantConfig())
    q = check(Wrapped(), lambda: tuple(make().values()), {"linear": 4}, config=config)
    assert sum(x.op == "matmul" for x in q.report.reference) == 2


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 32))
        self.pos = nn.Parameter(torch.randn(1, 17, 32) * 0.02)
        self.ln1, self.ln2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        q, k, v = self.qkv(self.ln1(x)).reshape(x.shape[0], -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.ln2(x))
        return self.head(x[:, 0])


def test_vit() -> None:
    q = check(ViT(), rand(2, 3, 16, 16), {"conv2d": 1, "linear": 5})
    assert any(x.op == "sdpa" for x in q.report.floats)


# ------------------------------------------------------------------------------------------------- HF transformers
def ids(n: int = 64, length: int = 10) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(n, (2, length)),)


def hf(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(vocab_size=64, use_cache=False, **options)
    return getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(config)


GPT2 = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_gpt2(exported: bool) -> None:
    """Weights of its Conv1D are transposed, and the embedding is the head's weight."""
    model = hf("GPT2", **GPT2)
    q = check(model, ids(), {"embedding": 2, "linear": 9}, exported=exported)
    assert q.report.count("linear") == 9


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_llama(exported: bool) -> None:
    check(hf("Llama", **LLAMA), ids(), {"embedding": 1, "linear": 15}, exported=exported)


def test_llama_with_dynamic_batch_and_length() -> None:
    model = hf("Llama", **LLAMA).eval()
    shapes = {"input_ids": {0: DYNAMIC, 1: DYNAMIC}}
    prepared = prepare(model, StaticQuantConfig(), example_inputs={"input_ids": ids()()[0]}, dynamic_shapes=shapes)
    with torch.no_grad():
        for b, n in ((1, 4), (3, 9), (2, 16)):
            prepared(input_ids=torch.randint(64, (b, n)))
        q = convert(prepared)
        x = torch.randint(64, (5, 13))
        assert sqnr(model(x).logits, q(input_ids=x).logits) > 25
    assert q.report.count("linear") == 15


# ---------------------------------------------------------------------------------------------------- other habits
class Branching(nn.Module):
    """Control flow on values: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.small, self.large = nn.Linear(8, 1), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate(x).mean() > 0:
            return self.large(x)
        return self.small(x)


def test_control_flow_is_quantized_layer_by_layer() -> None:
    model = Branching().eval()
    with pytest.warns(UserWarning) as caught:
        prepared = prepare(model, StaticQuantConfig(), inplace=False, example_inputs=torch.randn(4, 8))
    (text,) = [str(w.message) for w in caught if "layer by layer" in str(w.message)]
    assert "data-dependent" in text and "test_other_models.py" in text
    assert type(prepared) is Branching
    data = torch.randn(32, 4, 8)
    with torch.no_grad():
        for x in data:
            prepared(x)
        q = convert(prepared)
        same = [x for x in data if (model.gate(x).mean() > 0) == (q.gate(x).mean() > 0)]
        assert len(same) > 28 and all(sqnr(model(x), q(x)) > 30 for x in same)
    assert kernels(q.report) == {"linear": 3} and "layer by layer" in q.report.notes[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.emb(x))))


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_tied_weights(exported: bool) -> None:
    model = Tied()
    q = check(model, ids(40), {"embedding": 1, "linear": 2}, exported=exported)
    assert model.head.weight is model.emb.weight
    if exported:
        assert sum("head" in n or "emb" in n for n, _ in q.graph.named_buffers() if n.endswith("_q")) == 1


@dataclasses.dataclass
class Features:
    last: Tensor
    middle: list[Tensor]


pytree.register_dataclass(Features) if hasattr(pytree, "register_dataclass") else None


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))

    def forward(self, x: Tensor) -> dict[str, Any]:
        middle = []
        for stage in self.stages:
            x = F.relu(stage(x))
            middle.append(x)
        return {"last": x, "middle": middle, "size": x.shape[-1]}


def test_intermediate_features() -> None:
    q = check(Backbone(), rand(2, 3, 8, 8), {"conv2d": 3})
    out = q(torch.randn(2, 3, 8, 8))
    assert len(out["middle"]) == 3 and all(t.dtype == torch.float32 for t in out["middle"])


class Counter_(nn.Module):
    """Counts its calls, and keeps the last keys: buffers that the graph writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = self.out(torch.cat([y, self.cache], 1))
        self.calls += 1
        self.cache.copy_(y)
        return z


def test_mutated_buffers() -> None:
    model = Counter_().eval()
    prepared = prepare(model, StaticQuantConfig(), example_inputs=torch.randn(2, 8))
    data = torch.randn(6, 2, 8)
    with torch.no_grad():
        for x in data:
            prepared(x)
        assert int(model.calls) == 0, "calibration ran on the user's buffers"
        q, twin = convert(prepared), convert(prepared)
        for m in (q, twin):  # a converted model has a state of its own
            ours = {n.rpartition(".")[2]: b for n, b in m.lowered.named_buffers()}
            ours["calls"].zero_(), ours["cache"].zero_()
        got, want = [q(x) for x in data], [model(x) for x in data]
        assert int(model.calls) == 6
        assert int({n.rpartition(".")[2]: b for n, b in q.lowered.named_buffers()}["calls"]) == 6
        assert int({n.rpartition(".")[2]: b for n, b in twin.lowered.named_buffers()}["calls"]) == 0
    assert all(sqnr(a, b) > 28 for a, b in zip(want, got, strict=True))
    assert kernels(q.report) == {"linear": 2}


class Regions(nn.Module):
    """A part without gradients and a part under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.a(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.gelu(self.b(x))
        return self.c(x.float())


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_grad_and_autocast_regions(exported: bool) -> None:
    q = check(Regions(), rand(4, 16), {"linear": 3}, exported=exported)
    assert {x.module for x in q.report.kernels if x.op == "linear"} == {"a", "b", "c"}
