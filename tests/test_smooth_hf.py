"""Blocks of transformers' models with random weights: every pair is found, and the float function stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inc_graph.channel_stats import CALLS, Recalls
from inc_graph.export import export
from inc_graph.graph import clone
from inc_graph.passmanager import Pipeline
from inc_graph.quantization import SmoothQuantConfig, convert, prepare
from inc_graph.quantization.finish import _fresh, remember_buffers
from inc_graph.quantization.kept_calls import forget_calls, kept_calls
from inc_graph.quantization.smoothing import smooth_first
from inc_graph.recipe import set_recipe
from inc_graph.smooth_report import Smoothed, smooth_lines
from inc_graph.smoothing import Smoothing
from tests.graph_generator import KINDS, TWICE, RandomModel
from tests.passes.pipelines import captured
from tests.passes.pipelines import run as pipeline
from tests.smooth_models import PREPARE, outliers, plan

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


class Hidden(nn.Module):
    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.m, self.fixed = model, fixed

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.m(x, **self.fixed).last_hidden_state
        return hidden


def llama() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, vocab_size=50)
    return Hidden(LlamaModel(config), use_cache=False), IDS


def opt() -> tuple[nn.Module, Tensor]:
    from transformers import OPTConfig, OPTModel

    config = OPTConfig(**SIZES, ffn_dim=48, vocab_size=50, word_embed_proj_dim=32, max_position_embeddings=64)
    return Hidden(OPTModel(config), use_cache=False), IDS


def gptj() -> tuple[nn.Module, Tensor]:
    from transformers import GPTJConfig, GPTJModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 50, "n_positions": 64}
    return Hidden(GPTJModel(GPTJConfig(**sizes, bos_token_id=0, eos_token_id=0)), use_cache=False), IDS


def bloom() -> tuple[nn.Module, Tensor]:
    from transformers import BloomConfig, BloomModel

    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)
    return Hidden(BloomModel(config), use_cache=False), IDS


def bert() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertModel

    return Hidden(BertModel(BertConfig(**SIZES, intermediate_size=48, vocab_size=50), add_pooling_layer=False)), IDS


def vit() -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**SIZES, intermediate_size=48, image_size=32, patch_size=8)
    return Hidden(ViTModel(config, add_pooling_layer=False)), torch.randn(2, 3, 32, 32)


# {ends of the layers' paths: end of the path of who takes the scale; None: nobody}, for each of two blocks
QKV = ("q_proj", "k_proj", "v_proj")
PAIRS: dict[Any, dict[tuple[str, ...], str | None]] = {
    llama: {QKV: "input_layernorm", ("o_proj",): "v_proj", ("gate_proj", "up_proj"): "post_attention_layernorm",
            ("down_proj",): "up_proj"},
    opt: {QKV: "self_attn_layer_norm", ("out_proj",): "v_proj", ("fc1",): "final_layer_norm", ("fc2",): "fc1"},
    gptj: {(*QKV, "fc_in"): "ln_1", ("out_proj",): "v_proj", ("fc_out",): None},
    bloom: {("query_key_value",): "input_layernorm", ("self_attention.dense",): "query_key_value",
            ("dense_h_to_4h",): "post_attention_layernorm", ("dense_4h_to_h",): None},
    bert: {("query", "key", "value"): "LayerNorm", ("attention.output.dense",): "value",
           ("intermediate.dense",): "attention.output.LayerNorm", ("output.dense",): None},
    vit: {QKV: "layernorm_before", ("o_proj",): "v_proj", ("fc1",): "layernorm_after", ("fc2",): None},
}  # fmt: skip


def smoothed(model: nn.Module, config: Any, *args: Any) -> tuple[Any, Smoothed]:
    """The smoothed float graph, with observers, and what was done."""
    prepared: Any = prepare(export(model, args), config)
    with torch.no_grad():
        prepared(*args)
    work, kept = clone(prepared), kept_calls(prepared)
    forget_calls(work)
    gm = smooth_first(work, Pipeline.parse("smooth-quant"), kept, lambda name: None).graph
    return gm, smooth_lines(gm)


@pytest.mark.parametrize("kind", PAIRS, ids=lambda kind: kind.__name__)
def test_every_pair_is_found(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = kind()
    model = model.eval()
    for name, p in model.named_parameters():
        if "norm" in name.lower() or "ln_" in name:
            p.data = torch.randn_like(p) * 0.1 + outliers(len(p)) * ("weight" in name)
    gm, report = smoothed(model, SmoothQuantConfig(alpha=0.7), x)
    with torch.no_grad():
        want, got = model(x), gm(x)
    got = got[0] if isinstance(got, tuple | list) else got
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    left = [line for line in report if "patch" not in line.layers[0]]
    for ends, taker in PAIRS[kind].items():
        found = [x for x in left if len(x.layers) == len(ends) and all(map(str.endswith, x.layers, ends))]
        found = [x for x in found if ends != ("output.dense",) or "attention" not in x.layers[0]]
        assert len(found) == 2, ends
        for line in found:
            assert line.by == ("multiplied" if taker is None else "absorbed"), line
            assert taker is None or line.takers[0].endswith(taker)
            left.remove(line)
    assert not left


@pytest.mark.parametrize("kind", [llama, bert], ids=lambda kind: kind.__name__)
def test_converted(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = kind()
    model = model.eval()
    prepared = prepare(export(model, (x,)), SmoothQuantConfig(alpha="auto"))
    with torch.no_grad():
        prepared(x)
        got, want = convert(prepared)(x), model(x)
    assert float((got - want).norm() / want.norm()) < 0.05


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.booleans(), st.booleans())
def test_the_float_function_stays(seed: int, alpha: float, folding: bool, sharing: bool) -> None:
    stays(RandomModel(seed), RandomModel(seed), Smoothing(round(alpha, 3), folding, sharing))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.booleans())
def test_nor_where_an_operator_reads_a_value_twice(seed: int, alpha: float, folding: bool) -> None:
    model, again = (RandomModel(seed, 4, (*KINDS, *4 * TWICE)) for _ in range(2))
    stays(model, again, Smoothing(round(alpha, 3), folding))


def stays(model: RandomModel, again: RandomModel, how: Smoothing) -> None:
    """`again`: the same model, whose buffers are not written to yet."""
    args, kwargs = model.inputs()
    gm = captured(model, *args, **kwargs)
    set_recipe(gm, plan(how))
    gm = pipeline(gm, PREPARE).graph
    remember_buffers(gm)
    with torch.no_grad():
        gm(*args, **kwargs)
        fresh = _fresh(gm)  # its buffers are as they were before
        fresh.meta[CALLS] = Recalls([[*args, *kwargs.values()]])
        got = pipeline(fresh, "smooth-quant").graph(*args, **kwargs)
        want = again(*args, **kwargs)
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-3), name
