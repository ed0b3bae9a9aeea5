"""The bar of test_other_models for attention, written out in many ways, and for models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from inc_graph.export import export
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from tests.other_models import check, ids, rand, sqnr

pytestmark = pytest.mark.slow


DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
