"""Sums of outer products: the compiled code and torch's operators give the same, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inc_graph import products
from inc_graph.products import add_products, fast_products


@given(
    rows=st.integers(0, 300),
    cols=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    form=st.sampled_from(["dense", "strided", "transposed"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_equal_to_float64(rows: int, cols: int, dtype: torch.dtype, form: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2 * cols, generator=g).to(dtype)
    x = {"dense": x[:, :cols].contiguous(), "strided": x[:, :cols], "transposed": x[:, :cols].t().contiguous().t()}[
        form
    ]
    before = torch.randn(cols, cols, generator=g)
    before = before + before.t()
    exact = before.double() + x.double().t() @ x.double()
    kept = before.clone()

    found = add_products(before, x)
    assert found.dtype == torch.float32 and torch.equal(found, found.t())
    assert torch.equal(before, kept)
    assert (found - exact).abs().max() <= 2e-6 * (rows + 2) ** 0.5 * (1 + exact.abs().max())
    assert add_products(before, x, inplace=True) is before and torch.equal(before, found)


def test_bfloat16_rows_are_multiplied_by_compiled_code_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fast_products()
    if kernel is None:
        pytest.skip("no compiler, or the processor does not multiply bfloat16")
    x, calls = torch.randn(64, 96), []
    add = type(kernel).add
    monkeypatch.setattr(type(kernel), "add", lambda self, *a: (calls.append(1), add(self, *a)))
    fast = add_products(None, x.bfloat16())
    assert calls == [1]
    add_products(None, x)
    assert calls == [1]  # float32 is not rounded
    monkeypatch.setattr(products, "fast_products", lambda: None)
    assert torch.allclose(add_products(None, x.bfloat16()), fast, rtol=1e-5, atol=1e-5)


def test_threads_do_not_change_the_result() -> None:
    x, threads = torch.randn(1000, 200).bfloat16(), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(add_products(None, x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
