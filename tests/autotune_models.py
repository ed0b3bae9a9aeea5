"""What the tests of autotune tune."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.common.base_tuning import TuningConfig
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
