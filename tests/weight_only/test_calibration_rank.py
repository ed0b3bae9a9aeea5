"""What is said of layers whose calibration data does not tell enough: its rank, and damping that had to be raised."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inc_graph.errors import IncWarning
from inc_graph.passes.qparams._rank import rank_of
from inc_graph.products import add_products
from inc_graph.quantization import GPTQConfig, quantize
from inc_graph.weights import Gram


def gram_of(x: Tensor) -> Gram:
    return Gram(add_products(None, x), len(x))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(0, 48), st.integers(1, 200), st.booleans())
def test_the_rank_is_counted(seed: int, inputs: int, rank: int, rows: int, loud: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, generator=g) @ torch.randn(rank, inputs, generator=g)
    if loud:
        x[:, 0] *= 1e4
    want = min(rank, inputs, rows)
    sizes = torch.linalg.svdvals(x.double() / x.double().norm(dim=0).clamp(min=1e-9)).square()
    assume(want == 0 or float(sizes[want - 1]) > 1e-3)  # by chance it may be of a lower rank, nearly
    full = min(inputs if rank else 0, rows)
    assert rank_of(gram_of(x)) == (want if want < full - max(1, inputs // 16) else full)


def test_a_wide_layer_is_counted_in_part() -> None:
    x = torch.randn(300, 20) @ torch.randn(20, 1000)
    assert rank_of(gram_of(x)) == 20
    assert rank_of(gram_of(torch.randn(700, 1000))) == 700
    assert rank_of(gram_of(torch.randn(1200, 1000))) == 1000


def test_what_a_layer_norm_takes_out_is_not_missed() -> None:
    x = nn.functional.layer_norm(torch.randn(500, 64), (64,))
    assert rank_of(gram_of(x)) == 64


def calibrated(data: list[Tensor], scope: str, **options: Any) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    given: Any = {"example_inputs": (data[0],)} if scope == "graph" else {}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        q = quantize(model, GPTQConfig(group_size=16, **options), lambda m: [m(x) for x in data], **given)
    return q, [str(w.message) for w in seen if issubclass(w.category, IncWarning)]


def half_dead() -> Tensor:
    x = torch.randn(128, 32)
    x[:, ::2] = 0
    return x


@pytest.mark.parametrize("scope", ["graph", "layers"])
@pytest.mark.parametrize(("data", "rank"), [
    (torch.randn(1, 32).repeat(128, 1), 1), (torch.zeros(128, 32), 0), (half_dead(), 16), (torch.randn(5, 32), 5),
], ids=["copies", "zeros", "dead", "few"])  # fmt: skip
def test_a_warning_names_the_rank(data: Tensor, rank: int, scope: str) -> None:
    q, said = calibrated([data], scope)
    assert any(f"0 (rank {rank})" in text for text in said), said
    assert q.report.weights[0].rank == rank


def test_enough_data_is_not_warned_of() -> None:
    q, said = calibrated([torch.randn(64, 32) for _ in range(3)], "graph")
    assert not said and q.report.weights[0].rank is None


@pytest.mark.parametrize("scope", ["graph", "layers"])
def test_raised_damping_is_said(scope: str) -> None:
    q, said = calibrated([torch.randn(1, 32).repeat(128, 1)], scope, percdamp=0)
    damping = q.report.weights[0].damping
    assert damping > 0
    text = f"0 ({damping:g})"
    assert any("percdamp was raised" in s and text in s for s in said)
    assert any("percdamp was raised" in s and text in s for s in q.report.notes)
    q, said = calibrated([torch.randn(200, 32)], scope)
    assert not any("percdamp" in s for s in [*said, *q.report.notes])
    assert copy.deepcopy(q).report.notes == q.report.notes
