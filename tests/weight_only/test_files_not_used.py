"""What a config says of reading weights from files, of a model that has all its weights: a warning, not silence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from inc_graph.errors import IncWarning
from inc_graph.quantization import GPTQConfig, RTNConfig, prepare


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def said(config: Any, model: nn.Module, example: Any = None) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prepare(model, config, example_inputs=example)
    mine = [w for w in found if issubclass(w.category, IncWarning) and "not used" in str(w.message)]
    assert all(w.filename == __file__ for w in mine)
    return [str(w.message) for w in mine]


@pytest.mark.parametrize("example", [None, (torch.randn(2, 32),)], ids=["layers", "graph"])
@pytest.mark.parametrize(
    ("config", "names"),
    [
        (RTNConfig(model_path="/nowhere"), ["RTNConfig.model_path='/nowhere'"]),
        (GPTQConfig(use_block_wise=True), ["GPTQConfig.use_block_wise=True"]),
        (GPTQConfig(use_layer_wise=True, model_path="x"), ["model_path='x'", "GPTQConfig.use_layer_wise=True"]),
        (RTNConfig().set_local("0", GPTQConfig(model_path="y")), ["GPTQConfig.model_path='y'"]),
        (RTNConfig(), []),
        (RTNConfig(use_layer_wise=False), []),
        (GPTQConfig(), []),
    ],
)
def test_said_of_a_model_with_values(config: Any, names: list[str], example: Any) -> None:
    texts = said(config, made(), example)
    assert len(texts) == bool(names)
    assert all(name in texts[0] for name in names)
    assert not names or "load_empty_model" in texts[0]


def test_not_of_a_model_without(tmp_path: Path) -> None:
    save_file(made().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    assert not said(GPTQConfig(model_path=str(tmp_path), use_block_wise=True), empty)
