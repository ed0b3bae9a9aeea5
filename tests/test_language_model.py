"""The language model, its text and its measures; and the harness that compares weight-only methods on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import fresh_process, language_model, memory, weight_only
from benchmarks.tensor_bytes import held, shares

ROOT = Path(__file__).resolve().parents[1]


# --- text ------------------------------------------------------------------------------------------------------------

SENTENCE = (
    "Anarchism is a political philosophy that is sceptical of all justifications for authority and seeks to end it"
)


@pytest.mark.parametrize(
    "markup",
    [
        "{{cite|{{nested|{{three|{{four}}}}}}}}",
        "{| table |}",
        "&lt;ref name=a /&gt;&lt;ref&gt;note\nof two lines&lt;/ref&gt;",
        "<!-- a remark\nof two lines -->",
        "[[File:x.png|thumb|a caption]]",
        "'''''",
        "<br/>",
    ],
)
def test_markup_goes(markup: str) -> None:
    assert language_model._plain(f"{markup}{SENTENCE}{markup}.") == f"{SENTENCE}."


def test_links_leave_what_they_show() -> None:
    page = f"{SENTENCE} [[State (polity)|states]] and [[law]], see [https://example.org/a the page]."
    assert language_model._plain(page) == f"{SENTENCE} states and law, see the page."


def test_only_sentences_stay() -> None:
    page = f"== Heading ==\n* {SENTENCE}\nshort\n{SENTENCE}\n"
    assert language_model._plain(page) == SENTENCE


def test_too_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "wikipedia", lambda: "x" * 20)

    def tokenizer(text: str, return_tensors: str) -> Any:
        return SimpleNamespace(input_ids=torch.arange(len(text))[None])

    assert language_model.wiki_windows(tokenizer, 2, 2).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="text for 2 windows of 8 tokens, not for 3"):
        language_model.wiki_windows(tokenizer, 3, 8)


# --- measures --------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits that are a function of the token alone."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits(input_ids))


def test_perplexity() -> None:
    windows = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    uniform = Fixed(lambda ids: torch.zeros(*ids.shape, 10))
    assert language_model.perplexity(uniform, windows) == pytest.approx(10.0)
    successor = Fixed(lambda ids: 100.0 * nn.functional.one_hot(ids + 1, 10))
    perplexity, best = language_model.next_tokens(successor, windows)
    assert perplexity == pytest.approx(1.0) and best.tolist() == [1, 2, 3, 5, 6, 7]


@pytest.fixture(scope="module")
def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        nn.init.uniform_(parameter, 0.5, 2.0) if "norm" in name else nn.init.normal_(parameter, std=0.2)
    return model


def test_folding_keeps_the_function(tiny: Any) -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = tiny(input_ids=ids).logits
        weights = {name: p.clone() for name, p in tiny.named_parameters()}
        language_model.fold(tiny)
        assert torch.allclose(tiny(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    changed = {name.split(".", 3)[-1] for name, p in tiny.named_parameters() if not torch.equal(p, weights[name])}
    assert {f"{name}_proj.weight" for name in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")} < changed
    for layer in tiny.model.layers:
        assert layer.input_layernorm.weight.eq(1).all() and layer.post_attention_layernorm.weight.eq(1).all()
        assert torch.allclose(layer.mlp.up_proj.weight.norm(dim=1), layer.mlp.down_proj.weight.norm(dim=0))
        read = layer.self_attn.o_proj.weight.unflatten(1, (2, 3, 4)).norm(dim=(0, 2)).flatten()  # 3 query heads each
        assert torch.allclose(layer.self_attn.v_proj.weight.norm(dim=1), read)


def test_continuations_are_the_most_probable_tokens(tiny: Any) -> None:
    prompt = torch.tensor([5, 6, 7])
    tiny.generation_config.eos_token_id = None
    (found,) = language_model.continuations(tiny, [prompt], tokens=4)
    ids = prompt
    for _ in range(4):
        ids = torch.cat([ids, tiny(input_ids=ids[None]).logits[0, -1].argmax(-1, keepdim=True)])
    assert found == ids[3:].tolist()


def test_bytes_of_tensors() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert sum(held(model).values()) == 256, "shared memory counts once"
    model[0].kept = [{"float": torch.zeros(8, 8)}]
    assert sum(held(model).values()) == 512, "a copy that is no parameter counts"
    model[1].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
    before = {"0.weight": 128, "1.weight": 128}
    assert shares(model, before, r"^0\.") == (4.0, 2.5)


# --- the harness -----------------------------------------------------------------------------------------------------


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(fresh_process.Failed, match="KeyError: 'way'"):
        fresh_process.measure("benchmarks.memory", {})


def test_every_setting_makes_a_config() -> None:
    import inc_graph.quantization as q

    for setting in (*weight_only.SETTINGS, *weight_only.CNN):
        config = setting.config(q)
        assert config.name == setting.method and setting.takes(weight_only.OURS), setting.name
    assert not weight_only.SETTINGS[0].takes("hqq")


def test_tables() -> None:
    float_row = weight_only.Row("float32", "torch", 23.1, 1.0, 10, None, 2.0, 2.0)
    ours = weight_only.Row("RTN", weight_only.OURS, 39.5, 0.7, None, 2.0, 0.28, 1.0)
    peer = weight_only.Row("RTN", "neural_compressor", 39.6, 0.7, None, 8.0, 0.4, 1.0)
    failed = weight_only.Row("GPTQ", "neural_compressor", note="failed: ValueError")
    table = weight_only.table([float_row, ours, peer, failed])
    assert list(table.columns[6].cells) == ["", "0.25", "", ""] and list(table.columns[2].cells)[3] == "failed"
    rows = [memory.Row(memory.IMPORTS, 5_000_000), memory.Row("RTN", 9_000_000, 1.0, 40.0), memory.Row("x", note="no")]
    assert list(memory.table(rows).columns[2].cells) == ["0 MB", "4 MB", ""]


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return language_model.smollm2()


@pytest.mark.slow
@pytest.mark.real_model
def test_reference_figure(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    windows = language_model.wiki_windows(tokenizer)
    assert windows.shape == (6, 512) and windows.dtype == torch.int64
    assert language_model.perplexity(model, windows) == pytest.approx(23.136, abs=2e-3)


@pytest.mark.slow
@pytest.mark.real_model
def test_calibration_text_is_not_evaluated(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    evaluated, other = language_model.wiki_windows(tokenizer), language_model.calibration_windows(tokenizer)
    assert other.shape == (64, 512)
    assert len(tokenizer.decode(evaluated.flatten())) < language_model.CALIBRATION_START
    assert not {tuple(w) for w in evaluated.tolist()} & {tuple(w) for w in other.tolist()}


@pytest.mark.slow
@pytest.mark.real_model
def test_folding_breaks_the_grid(smollm2: tuple[Any, Any]) -> None:
    def error(weight: Tensor) -> float:
        groups = weight.unflatten(1, (-1, 32))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = ((high - low) / 15).clamp_min(1e-12)
        rounded = low + ((groups - low) / step).round() * step
        return float((groups - rounded).norm() / groups.norm())

    original, _ = language_model.smollm2(folded=False)
    assert original.lm_head.weight is original.model.embed_tokens.weight
    assert smollm2[0].lm_head.weight is not smollm2[0].model.embed_tokens.weight
    for name in ("q_proj", "o_proj"):
        packaged, folded = (m.model.layers[3].self_attn.get_submodule(name).weight for m in (original, smollm2[0]))
        assert error(packaged) < 1e-3 < 0.03 < error(folded)


@pytest.mark.slow
@pytest.mark.real_model
def test_quick_race(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = ["benchmarks.weight_only", "--quick", "--only", "rtn", "--setting", "8-bit", "--json", str(rows)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference, per_channel, groups = json.loads(rows.read_text())["SmolLM2"]
    for ours in (per_channel, groups):
        assert ours["note"] == "" and ours["agreement"] > 0.9, ours["setting"]
        assert ours["perplexity"] == pytest.approx(reference["perplexity"], rel=0.2), ours["setting"]
    assert 0.5 <= per_channel["layers"] < 0.52 < groups["layers"] < 1, "scales and zero points of groups of 16"


@pytest.mark.slow
@pytest.mark.real_model
def test_memory_is_that_of_the_process() -> None:
    ballast = torch.ones(2**30, dtype=torch.uint8)
    rows = memory.race(["RTN in memory", "RTN streamed", "GPTQ streamed"], quick=True, say=lambda text: None)
    imports, whole, streamed, calibrated = rows
    assert imports.peak < ballast.nbytes, "memory of the process that started it is not counted"
    assert imports.peak < streamed.peak < whole.peak, [row.note for row in rows]
    assert streamed.peak - imports.peak < 0.3e9 and streamed.perplexity == pytest.approx(whole.perplexity, rel=1e-3)
    assert calibrated.peak - imports.peak < 0.45e9, calibrated.note
