"""Adapters of `peft` on models with quantized weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import IncError
from inc_graph.quantization import RTNConfig, StaticQuantConfig, load, quantize, save
from inc_graph.quantization.leaf import Leaf

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
CONFIG = RTNConfig(group_size=32)


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def prompt() -> Tensor:
    return torch.arange(3, 27).reshape(2, 12)


def quantized(**options: Any) -> nn.Module:
    return quantize(llama(**options), CONFIG)


def generated(model: nn.Module, **options: Any) -> Tensor:
    mask = torch.ones_like(prompt())
    return model.generate(prompt(), attention_mask=mask, max_new_tokens=6, do_sample=False, **options)


# ------------------------------------------------------------------------------------------------- the model itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_generate_with_its_cache(dtype: torch.dtype, tied: bool) -> None:
    q = quantized(tie_word_embeddings=tied).to(dtype)
    with_cache = generated(q)
    assert with_cache.shape == (2, 18)
    if dtype == torch.float32:  # rounding of bfloat16 is not the same for one row and for many
        assert torch.equal(with_cache, generated(q, use_cache=False))


def test_generate_computes_with_the_dequantized_weights() -> None:
    q, plain = quantized(), llama()
    for path, leaf in q.named_modules():
        if isinstance(leaf, Leaf):
            plain.get_submodule(path).weight.data.copy_(leaf.weight)
    close = (q(prompt()).logits - plain(prompt()).logits).norm() / plain(prompt()).logits.norm()
    assert float(close.detach()) < 0.02


# --------------------------------------------------------------------------------------------------------- adapters
@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def adapted(peft: Any, model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's own
        return peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], **options}))


def train(model: Any, steps: int = 8) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=prompt(), labels=prompt()).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_and_nothing_else_does(peft: Any, dtype: torch.dtype, checkpointing: bool) -> None:
    q = quantized().to(dtype)
    if checkpointing:
        q.gradient_checkpointing_enable()
    before = {k: v.clone() for k, v in q.state_dict().items()}
    model = adapted(peft, q)
    if checkpointing:
        model.enable_input_require_grads()
    wrapped = [m for m in model.modules() if type(m).__module__.startswith("peft") and hasattr(m, "base_layer")]
    assert len([m for m in wrapped if isinstance(m.base_layer, Leaf)]) == 4
    model.train()
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in n for n in trained)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    after = {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("target", ["all-linear", ["embed_tokens", "down_proj"]])
def test_other_targets(peft: Any, target: Any) -> None:
    model = adapted(peft, quantized(), target_modules=target)
    losses = train(model, 4)
    assert losses[-1] < losses[0]


def test_other_kinds_of_layers(peft: Any) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    model = adapted(peft, quantize(transformers.GPT2LMHeadModel(config).eval(), CONFIG), target_modules=["c_attn"])
    assert isinstance(model.base_model.model.transformer.h[0].attn.c_attn.base_layer, Leaf)
    losses = train(model, 4)
    assert losses[-1] < losses[0]
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    q = quantize(images, StaticQuantConfig(w_dtype="int4", act_dtype="fp32", bias_correction=False))
    wrapped = adapted(peft, q, target_modules=["0", "2"])
    x = torch.randn(2, 3, 8, 8)
    wrapped.train()(x).sum().backward()
    assert all("lora_" in n for n, p in wrapped.named_parameters() if p.grad is not None)
    with pytest.raises(IncError, match="nor an adapter merged into it"):
        wrapped.merge_and_unload()


def test_an_adapter_is_not_merged_into_codes(peft: Any) -> None:
    model = adapted(peft, quantized())
    train(model, 2)
    want = model(prompt()).logits
    for merge in (
        model.merge_adapter,
        lambda: model.merge_and_unload(),
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(IncError, match="nor an adapter merged into it"):
            merge()
        assert torch.equal(model(prompt()).logits, want)
    with model.disable_adapter():
        assert torch.equal(model(prompt()).logits, quantized()(prompt()).logits)
    assert torch.equal(model.unload()(prompt()).logits, quantized()(prompt()).logits)


def test_adapter_and_model_are_saved_apart(peft: Any, tmp_path: Path) -> None:
    q = quantized()
    save(q, tmp_path / "model")
    model = adapted(peft, q)
    train(model, 3)
    want = model(prompt()).logits
    model.save_pretrained(tmp_path / "adapter")
    stored = sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    assert stored < 64_000
    back = load(tmp_path / "model", llama())
    assert not torch.equal(back(prompt()).logits, want)
    again = peft.PeftModel.from_pretrained(back, tmp_path / "adapter").eval()
    assert torch.equal(again(prompt()).logits, want)
    assert torch.equal(generated(again), generated(model))
    twin = copy.deepcopy(again).to(torch.bfloat16)
    assert twin(prompt()).logits.dtype == torch.bfloat16 and torch.equal(again(prompt()).logits, want)
