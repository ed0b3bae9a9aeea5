"""A model of which a weight-only method leaves most float without being asked to says so, in one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import IncWarning
from inc_graph.quantization import DynamicQuantConfig, RTNConfig, quantize

WIDTH = 32


class Experts(nn.Module):
    """All experts in one parameter."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, count)
        self.up = nn.Parameter(torch.randn(count, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc,ni,cio->no", self.gate(x).softmax(-1), x, self.up)


class Model(nn.Module):
    def __init__(self, experts: int = 0, rows: int = 0, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(max(rows, 2), WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle: Any = Experts(experts) if experts else middle or nn.Identity()
        self.lm_head = nn.Linear(WIDTH, max(rows, 2), bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.middle(self.first(self.table(ids))))
        return y


def left(model: nn.Module, config: Any, scope: str) -> tuple[list[str], list[str]]:
    """(warnings, notes) of what was left float."""
    example = (torch.arange(2).repeat(4),) if scope == "graph" else None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        q = quantize(model.eval(), config, example_inputs=example)
    said = [str(w.message) for w in seen if issubclass(w.category, IncWarning) and "stay float (" in str(w.message)]
    return said, [n for n in q.report.notes if "stay float (" in n]  # type: ignore[union-attr, operator]


SCOPES = pytest.mark.parametrize("scope", ["layers", "graph"])


@SCOPES
def test_experts_of_one_parameter(scope: str) -> None:
    said, notes = left(Model(experts=8), RTNConfig(), scope)
    assert len(said) == len(notes) == 1 and said[0].startswith(notes[0])
    share = 100 * 8 * WIDTH**2 / (8 * WIDTH**2 + WIDTH**2 + 8 * WIDTH + 2 * WIDTH)
    assert f"{share:.1f} %" in said[0] and "Experts: 0.0328 MB" in said[0] and "a Linear for each expert" in said[0]


@SCOPES
def test_layers_that_have_to_be_named(scope: str) -> None:
    middle = nn.Sequential(nn.Unflatten(1, (WIDTH, 1)), nn.Conv1d(WIDTH, WIDTH, 9, padding=4), nn.Flatten(1))
    said, _ = left(Model(middle=middle), RTNConfig(), scope)
    assert len(said) == 1 and "Conv1d: 0.0369 MB" in said[0] and "set_local" in said[0]
    assert left(Model(middle=middle), RTNConfig().set_local(nn.Conv1d, RTNConfig()), scope) == ([], [])


@SCOPES
@pytest.mark.parametrize(
    ("model", "config"),
    [
        (lambda: Model(rows=500), RTNConfig()),  # a table, and a head that stays float unless it is asked for
        (lambda: Model(experts=1), RTNConfig().set_local("lm_head", RTNConfig())),  # less than half
        (lambda: Model(), RTNConfig(dtype="fp32").set_local("lm_head", RTNConfig(group_size=-1))),
        (lambda: Model(), RTNConfig().set_local("first", RTNConfig(dtype="fp32")).set_local("lm_head", RTNConfig())),
        (lambda: Model(experts=8), RTNConfig(white_list=["first"])),
        (lambda: Model(experts=8), DynamicQuantConfig()),
    ],
)
def test_what_was_asked_for_is_not_warned_of(model: Any, config: Any, scope: str) -> None:
    assert left(model(), config, scope) == ([], [])
