"""Checkpoints of transformers whose tensors have other names than the parameters, or are put together to one; and what
is left of an empty model when something fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inc_graph.errors import CalibrationError, ConfigError
from inc_graph.quantization import GPTQConfig, RTNConfig, quantize
from inc_graph.utils import load_empty_model

transformers = pytest.importorskip("transformers", minversion="5")

_ROUND = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL = {**_ROUND, "vocab_size": 101, "max_position_embeddings": 64}
_MOE = {**_SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2}
MODELS = {
    "GPTNeoX": _SMALL,
    "Mixtral": {**_MOE, "num_local_experts": 3},
    "Qwen3Moe": {**_MOE, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "Llama": {**_SMALL, "tie_word_embeddings": True},
}


def made(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**MODELS[name], **more})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def ids() -> Tensor:
    return torch.randint(0, 101, (4, 24), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module) -> None:
    model(input_ids=ids(), use_cache=False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids()).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_streamed_is_what_from_pretrained_would_have_given(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").keys()
    assert name == "Llama" or set(model.state_dict()) != set(stored), "the names differ, or this shows nothing"
    streamed = quantize(load_empty_model(tmp_path), RTNConfig())
    want = quantize(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), RTNConfig()
    )
    assert not any(t.is_meta for t in (*streamed.parameters(), *streamed.buffers()))
    assert torch.equal(logits(streamed), logits(want))


def test_a_checkpoint_of_another_model_is_refused_with_what_is_there(tmp_path: Path) -> None:
    made("GPTNeoX").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k.replace("embed_out", "projection"): v for k, v in tensors.items()}, file, {"format": "pt"})
    empty = load_empty_model(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)no tensor 'lm_head.weight'; .*'projection.weight'.*load it") as e:
        quantize(empty, RTNConfig())
    assert e.value.module == "lm_head" and all(p.is_meta for p in empty.parameters())


def test_experts_that_cannot_be_put_together_are_refused(tmp_path: Path) -> None:
    made("Mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith("experts.1.w1.weight"))
    save_file({k: v[:-1].clone() if k == name else v for k, v in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"(?s)gate_up_proj' cannot be made of .*w1.weight' and 5 more.*from_pretrained"
    ):
        quantize(load_empty_model(tmp_path), RTNConfig())


def test_codes_are_not_taken_for_weights(tmp_path: Path) -> None:
    made("Llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith("up_proj.weight"))
    save_file({k: v.to(torch.float8_e4m3fn) if k == name else v for k, v in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"up_proj.*float8_e4m3fn: the checkpoint is quantized already"):
        quantize(load_empty_model(tmp_path), RTNConfig())


def _fails(model: nn.Module) -> None:
    run(model)
    raise RuntimeError("no more data")


@pytest.mark.parametrize(("work", "error"), [(_fails, RuntimeError), (lambda model: None, CalibrationError)])
def test_an_empty_model_is_empty_again_after_a_failure(work: Any, error: Any, tmp_path: Path) -> None:
    made("Llama").save_pretrained(tmp_path)
    empty = load_empty_model(tmp_path)
    before = {name: id(p) for name, p in empty.named_parameters(remove_duplicate=False)}
    kinds = [type(m) for m in empty.modules()]
    with pytest.raises(error):
        quantize(empty, GPTQConfig(), work)
    assert all(p.is_meta for p in empty.parameters())
    assert {name: id(p) for name, p in empty.named_parameters(remove_duplicate=False)} == before
    assert [type(m) for m in empty.modules()] == kinds
    assert len(quantize(empty, GPTQConfig(), run).report.weights) == 14


def test_a_damaged_rest_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    made("Llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v[:-1].clone() if k == "model.norm.weight" else v for k, v in load_file(file).items()}, file)
    empty = load_empty_model(tmp_path)
    kinds = [type(m) for m in empty.modules()]
    with pytest.raises(ConfigError, match=r"'model.norm.weight' has shape \[63\]"):
        quantize(empty, RTNConfig())
    assert all(p.is_meta for p in empty.parameters()) and [type(m) for m in empty.modules()] == kinds
