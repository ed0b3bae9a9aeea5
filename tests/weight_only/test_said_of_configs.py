"""What is said of weight-only configs: fields that cannot act, or exclude each other; and what their reports hold."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inc_graph.errors import ConfigError, IncWarning
from inc_graph.quantization import (
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    StaticQuantConfig,
    convert,
    load,
    prepare,
    quantize,
    save,
)
from inc_graph.report import Report
from inc_graph.utils import load_empty_model


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()


def said(config: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prepare(model(), config)
    return [str(w.message) for w in seen if issubclass(w.category, IncWarning)]


@pytest.mark.parametrize("config,field", [
    (RTNConfig(use_full_range=True, use_sym=False), "RTNConfig.use_full_range=True"),
    (RTNConfig(use_full_range=True, dtype="nf4"), "RTNConfig.use_full_range=True"),
    (RTNConfig(dtype="nf4", use_sym=False), "RTNConfig.use_sym=False"),
    (GPTQConfig(dtype="fp8_e4m3", use_sym=False), "GPTQConfig.use_sym=False"),
    (RTNConfig(dtype="int4", bits=8), "RTNConfig.bits=8"),
    (HQQConfig(dtype="int8", bits=3, group_size=16), "HQQConfig.bits=3"),
    (RTNConfig().set_local("1", RTNConfig(dtype="nf4", bits=8)), "RTNConfig.bits=8"),
    (GPTQConfig(white_list=["0"]) + RTNConfig(dtype="int2", bits=6, white_list=["1"]), "RTNConfig.bits=6"),
], ids=str)  # fmt: skip
def test_a_field_without_effect_is_named(config: Any, field: str) -> None:
    found = [text for text in said(config) if text.startswith("no effect: ")]
    assert len(found) == 1 and field in found[0]


@pytest.mark.parametrize("config", [
    RTNConfig(), GPTQConfig(), HQQConfig(group_size=16), RTNConfig(dtype="nf4"), RTNConfig(dtype="nf4", bits=4),
    RTNConfig(dtype="fp8_e4m3", bits=8), RTNConfig(dtype="fp8_e4m3"), RTNConfig(dtype="int8", bits=8),
    RTNConfig(dtype="int8"), RTNConfig(bits=3, use_sym=False), RTNConfig(use_full_range=True),
    RTNConfig(dtype="fp4", group_dim=0), StaticQuantConfig(),
], ids=str)  # fmt: skip
def test_nothing_is_said_of_what_acts_or_is_a_default(config: Any) -> None:
    assert not [text for text in said(config) if "no effect" in text]


@pytest.mark.parametrize("config,text", [
    (RTNConfig(use_double_quant=True, double_quant_group_size=1), r"RTNConfig\.double_quant_group_size=1"),
    (GPTQConfig(use_double_quant=True, double_quant_group_size=1), r"GPTQConfig\.double_quant_group_size=1"),
    (HQQConfig(scale_quant_group_size=1), r"HQQConfig\.scale_quant_group_size=1"),
    (GPTQConfig(fp8_aware=True, use_double_quant=True), "fp8_aware and use_double_quant exclude each other"),
], ids=str)  # fmt: skip
def test_errors_name_the_fields_of_the_config(config: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as e:
        prepare(model(), config)
    assert not any(word in str(e.value) for word in ("scale_group ", "meta_group", "scale_type"))


def test_groups_of_scales_that_are_not_quantized_do_not_matter() -> None:
    quantize(model(), HQQConfig(scale_quant_group_size=1, quant_zero=False, group_size=16))
    quantize(model(), RTNConfig(double_quant_group_size=1))


@pytest.mark.parametrize("scope", ["graph", "layers"])
def test_the_scale_of_fp8_and_dead_inputs_are_in_the_report(scope: str, tmp_path: Path) -> None:
    x = torch.randn(128, 32)
    x[:, 3] = 0
    example: Any = {"example_inputs": (x,)} if scope == "graph" else {}
    prepared = prepare(model(), GPTQConfig(fp8_aware=True), **example)
    prepared(x)
    with pytest.warns(IncWarning, match="rank 31"):
        q = convert(prepared)
    line = q.report.weights[0]
    assert line.dead == 1 and line.rank == 31
    scale = line.fp8_scale
    assert scale is not None and scale > 0
    graph = q.graph if scope == "graph" else q[0].inner.graph
    values = next(n for n in graph.graph.nodes if "weight" in n.meta.get("custom", {}).get("inc", {}))
    assert values.meta["custom"]["inc"]["weight"]["notes"]["fp8_scale"] == scale
    weight = q[0].weight if scope == "layers" else None
    if weight is not None:
        scaled = weight.detach() / scale
        assert torch.equal(scaled.to(torch.float8_e4m3fn).float(), scaled)  # what an FP8 product takes, without loss
    assert Report.from_json(q.report.to_json()).weights == q.report.weights
    save(q, tmp_path)
    assert (
        load(tmp_path, **({} if scope == "graph" else {"original_model": model()})).report.weights[0].fp8_scale == scale
    )


@pytest.mark.parametrize("config", [RTNConfig(bits=4, group_size=16), RTNConfig(bits=8, group_size=16)], ids=str)
@pytest.mark.parametrize("scope", ["graph", "layers"])
def test_only_int8_kernels_are_called_so(config: Any, scope: str) -> None:
    example: Any = {"example_inputs": (torch.zeros(8, 32),)} if scope == "graph" else {}
    q = quantize(model(), config, **example)
    assert "in int8 kernels" not in repr(q)
    static = quantize(model(), StaticQuantConfig(), lambda m: m(torch.randn(8, 32)), **example)
    assert "in int8 kernels" in repr(static)


@pytest.mark.parametrize("kind", [RTNConfig, HQQConfig, GPTQConfig])
def test_a_tied_head_is_said_when_weights_are_read_from_files(kind: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)
    whole = LlamaForCausalLM(config).eval()
    whole.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (4, 16))

    def notes(m: Any) -> list[str]:
        method = kind(group_size=16, quant_lm_head=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncWarning)
            return quantize(m, method, lambda m: m(input_ids=ids, use_cache=False)).report.notes

    in_memory, streamed = notes(copy.deepcopy(whole)), notes(load_empty_model(str(tmp_path)))
    tied = [note for note in in_memory if "shared its weight" in note]
    assert len(tied) == 1 and tied[0] in streamed
