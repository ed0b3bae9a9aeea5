"""The compiled steps of LSTM and GRU: as the operators of the dialect on the same weights, whatever the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inc_graph.lowering import _recurrent
from inc_graph.lowering._recurrent import gru, lstm, taken
from inc_graph.lowering._recurrent_native import steps
from inc_graph.recurrent import GRU_STEPS, LSTM_STEPS

compiled = pytest.mark.skipif(steps() is None, reason="no C compiler")


def weights(rows: int, cols: int, per_row: bool) -> tuple[Tensor, Tensor, list[int]]:
    codes = torch.randint(-128, 128, (rows, cols), dtype=torch.int8)
    scale = torch.rand(rows if per_row else 1, 1) / (40 * cols**0.5) + 1e-4
    return codes, scale, [1 if per_row else -1, -1]


def run(kind: str, x: Tensor, h: Tensor, c: Tensor, w: Any, bias: Any, reverse: bool, sizes: Any) -> Tensor:
    codes, scale, block = w
    head = (codes, scale, None, block, "int8")
    if kind == "lstm":
        return lstm(x, h, c, *head, None, None, None, [], "", None, sizes, reverse, torch.float32)
    return gru(x, h, *head, bias, sizes, reverse, torch.float32)


def reference(kind: str, x: Tensor, h: Tensor, c: Tensor, w: Any, bias: Any, reverse: bool, sizes: Any) -> Tensor:
    values = w[0].float() * w[1]
    if kind == "lstm":
        return LSTM_STEPS(x, h, c, values, reverse, sizes)
    return GRU_STEPS(x, h, values, bias, reverse, sizes)


@compiled
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["lstm", "gru"]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    units=st.sampled_from([1, 3, 15, 16, 17, 31, 33, 64, 100]),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    size=st.sampled_from([0.0, 0.5, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1 << 20),
)
def test_as_the_reference(
    kind: str, lengths: list[int], units: int, options: Any, size: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    per_row, reverse, packed, biased = options
    lengths = sorted(lengths, reverse=True) if packed else lengths[:1] * len(lengths)
    n, gates = len(lengths), 4 if kind == "lstm" else 3
    sizes = torch.tensor([sum(k > t for k in lengths) for t in range(lengths[0])])
    x = torch.randn(int(sizes.sum()), gates * units).to(dtype)
    x, given = (x, sizes) if packed else (x.view(-1, n, gates * units), None)
    h, c = size * torch.randn(n, units), torch.randn(n, units)
    w, bias = weights(gates * units, units, per_row), torch.randn(gates * units) if biased else None
    before = taken["native"]
    have = run(kind, x, h.to(dtype), c.to(dtype), w, bias, reverse, given)
    assert taken["native"] == before + 1 and have.dtype == dtype
    want = reference(kind, x.float(), h.to(dtype).float(), c.to(dtype).float(), w, bias, reverse, given)
    exact = dtype == torch.float32
    limit = 5e-3 if size > 1 else 3e-4  # of 16 bits of the largest state
    torch.testing.assert_close(have.float(), want, rtol=0 if exact else 1e-2, atol=limit if exact else 2e-2)


@compiled
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_threads_give_the_same(kind: str) -> None:
    """Large enough to be cut into parts."""
    gates, units = (4, 400) if kind == "lstm" else (3, 400)
    x, h, c = torch.randn(6, 5, gates * units), torch.randn(5, units) / 2, torch.randn(5, units)
    w, threads = weights(gates * units, units, True), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(run(kind, x, h, c, w, None, False, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], reference(kind, x, h, c, w, None, False, None), rtol=0, atol=3e-4)


@compiled
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nan_stays_in_its_sequence(kind: str) -> None:
    gates = 4 if kind == "lstm" else 3
    x, h, c = torch.randn(5, 3, gates * 20), torch.randn(3, 20), torch.randn(3, 20)
    x[2, 1, 7] = float("nan")
    h[2, 4] = float("inf")
    y = run(kind, x, h, c, weights(gates * 20, 20, True), None, False, None)[..., :20]
    assert y[:, 0].isfinite().all() and y[:2, 1].isfinite().all()
    assert y[2, 1].isnan().sum() == 1 and y[3:, 1].isnan().all() and y[:, 2].isnan().all()


def test_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    x, h, c = torch.randn(5, 3, 80), torch.randn(3, 20), torch.randn(3, 20)
    w = weights(80, 20, True)
    monkeypatch.setattr(_recurrent, "steps", lambda: None)
    before = taken["loop"]
    y = run("lstm", x, h, c, w, None, True, None)
    assert taken["loop"] == before + 1
    torch.testing.assert_close(y, reference("lstm", x, h, c, w, None, True, None), rtol=0, atol=1e-4)
