"""bfloat16 of trained models: as close to float32 as other compilers get, in half the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import real_models as rm
from inc_graph.lowering import _half
from inc_graph.quantization import MixedPrecisionConfig, convert, load
from inc_graph.report import attribute_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(not _half.has_kernels(torch.bfloat16), reason="oneDNN has no bfloat16 here"),
]


@pytest.mark.parametrize(("name", "least"), [("minilm", 40.8), ("efficientnet", 27.1)])
@torch.no_grad()
def test_accuracy_and_bytes(name: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`least`: dB of inductor in bfloat16."""
    monkeypatch.setenv("FORCE_BF16", "1")
    if name == "minilm":
        model, tokenizer, documents, _ = rm.minilm()
        inputs = next(iter(rm.batches(tokenizer, documents, 4)))
        kept = inputs[1].bool()
    else:
        model, images, _ = rm.efficientnet_lite0()
        inputs, kept = (images[:8],), torch.ones(8, dtype=torch.bool)
    half = convert(model, MixedPrecisionConfig(dtype="bf16"), example_inputs=inputs)
    have = half(*inputs)
    assert rm.sqnr_db(model(*inputs)[kept], have[kept]) >= least
    weights = sum(p.nbytes for p in model.parameters())
    assert attribute_bytes(half) < 0.52 * weights
    half.save(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) < 0.51 * weights
    assert torch.equal(load(tmp_path)(*inputs), have)
    layers = {line.op for line in half.report.floats} & {"linear", "conv2d", "embedding", "sdpa"}
    assert not layers
