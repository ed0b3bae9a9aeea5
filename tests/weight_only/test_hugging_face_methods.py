"""Methods of transformers' models that work on float weights, called on models with quantized layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inc_graph.errors import IncError
from inc_graph.quantization import RTNConfig, load, quantize

IDS = torch.arange(12)[None]


def made(tied: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_save_pretrained_would_lose_the_weights(tmp_path: Path) -> None:
    model = quantize(made(), RTNConfig())
    for part in (model, model.model):
        with pytest.raises(IncError, match=r"(?s)save_pretrained.*inc_graph.quantization.save"):
            part.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save(tmp_path)
    back = load(tmp_path, made())
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, model(IDS).logits)
    with pytest.raises(IncError, match="save_pretrained"):
        back.save_pretrained(tmp_path / "other")


def test_adapters_are_saved_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(quantize(made(), RTNConfig()), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)
    model.eval().save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(quantize(made(), RTNConfig()), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("head", [True, False])
def test_weights_are_tied_once_more(head: bool) -> None:
    model = quantize(made(tied=True), RTNConfig(quant_lm_head=head))
    with torch.no_grad():
        want = model(IDS).logits
        model.tie_weights()
        assert torch.equal(model(IDS).logits, want)
    if not head:  # nothing in the way of it
        table = model.model.embed_tokens
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(table.weight))
        model.tie_weights()
        assert model.lm_head.weight is table.weight
