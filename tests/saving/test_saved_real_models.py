"""Real trained models on disk: a quarter of the float bytes, the same outputs, in less time than quantizing takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import saving
from inc_graph.quantization import StaticQuantConfig, load, quantize

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


@pytest.mark.parametrize("name", saving.MODELS)
def test_graphs(name: str, tmp_path: Path) -> None:
    rows = saving.measure(*saving.MODELS[name](), tmp_path)
    ours = rows[-1]
    assert ours.name == "inc_graph" and ours.difference == 0
    assert ours.bytes < 0.29 * rows[0].bytes
    assert ours.bytes < min(row.bytes for row in rows[:-1])


def test_layers_of_a_transformers_model(tmp_path: Path) -> None:
    """The model keeps its class and its output classes; tables, heads and norms come back, too."""
    import copy

    model, calibration = saving.minilm()
    bert = model.bert
    ids, mask = calibration[0]
    fresh = copy.deepcopy(bert)
    q = quantize(bert, StaticQuantConfig(), lambda p: p(input_ids=ids, attention_mask=mask))
    q.save(tmp_path)
    loaded = load(tmp_path, original_model=fresh)
    with torch.no_grad():
        a, b = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (q, loaded))
    assert torch.equal(a, b) and loaded.config is fresh.config
    assert loaded.report.count("linear") == 36 and loaded.report.count("embedding") == 3
