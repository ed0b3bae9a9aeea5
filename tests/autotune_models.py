"""What the tests of autotune tune."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.common import Options, options
from inc_graph.common.base_tuning import TuningConfig
from inc_graph.errors import IncWarning
from inc_graph.quantization import StaticQuantConfig, autotune

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


ACT = ["minmax", "percentile", "kl"]


def run(prepared: nn.Module) -> None:
    prepared(X)


def tune(model: nn.Module, scores: list[float], **kwargs: Any) -> nn.Module:
    """Tuned with given scores: that of the float model first."""
    left = iter(scores)
    fields = {k: kwargs.pop(k) for k in list(kwargs) if k in TuningConfig.__dataclass_fields__}
    fields.setdefault("config_set", [StaticQuantConfig(act_algo=a) for a in ACT])
    kwargs.setdefault("example_inputs", (X,))
    return autotune(model, TuningConfig(**fields), lambda m: next(left), run_fn=run, **kwargs)


class Tuned(nn.Module):
    """Has a part of the name that the result goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.tuning = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tuning(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in vars(Options()).items():
        monkeypatch.setattr(options, name, value)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", IncWarning)
        yield
