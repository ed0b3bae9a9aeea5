"""Dynamic layers that read the same codes as one product: when, when not, and that nothing is different for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.lowering import _dynamic_joined, inductor
from inc_graph.lowering._attention import attention
from inc_graph.lowering._dynamic import HAS_OPAQUE, DynamicLayer, dynamic_layer, taken
from inc_graph.quantization import load, save
from tests.backends.test_dynamic_linear import TOKENS, quantized


class Attention(nn.Module):
    """Heads of 16; `form` is what becomes of q, k and v."""

    def __init__(
        self, form: str = "view", bias: tuple[bool, bool, bool] = (True, True, True), narrow: int = 32
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, n, bias=b) for n, b in zip((32, narrow, narrow), bias, strict=True))
        self.out, self.form = nn.Linear(32, 32), form

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.form == "other codes":
            v = self.v(x + 1)
        elif self.form == "called twice":
            k = self.q(x)
        if self.form == "read by a sum":
            return self.out(q + k + v)
        q, k, v = (y.view(*y.shape[:-1], -1, 16).transpose(1, 2) for y in (q, k, v))
        if self.form == "grouped":
            k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        if self.form == "matmul":
            y = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def apart(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> Any:
    with monkeypatch.context() as m:
        m.setattr(inductor, "join_layers", lambda context: None)
        return quantized(*args, **kwargs)


def layers(q: Any) -> list[DynamicLayer]:
    return [x for x in vars(q.lowered).values() if isinstance(x, DynamicLayer)]


def products(q: Any, *inputs: Tensor) -> int:
    taken.clear()
    q(*inputs)
    return taken["gemm"]


@pytest.mark.parametrize(
    "form, bias, config",
    [
        ("view", (True, True, True), TOKENS),
        ("matmul", (True, False, True), {**TOKENS, "act_sym": True}),
        ("view", (False, False, False), {"w_granularity": "per_channel"}),
    ],
    ids=str,
)
def test_joined(monkeypatch: pytest.MonkeyPatch, form: str, bias: tuple[bool, bool, bool], config: Any) -> None:
    torch.manual_seed(0)
    model, x = Attention(form, bias).eval(), torch.randn(2, 24, 32)
    q, want = quantized(model, (x,), **config), apart(monkeypatch, model, (x,), **config)
    assert products(q, x) == 2 and products(want, x) == 4
    assert q.report.kernels == want.report.kernels and q.report.count("linear") == 4
    torch.testing.assert_close(q(x), want(x), atol=1e-6, rtol=1e-6)
    assert sorted(x.shape for x in layers(q)) == [(32, 32), (96, 32)]  # the layers that were joined are gone
    for name, codes in want.graph.named_buffers():
        assert torch.equal(q.graph.get_buffer(name), codes)
    extra = 0 if bias in ((True,) * 3, (False,) * 3) else 4 * 32  # zeros of the bias that one layer does not have
    assert sum(x.nbytes() for x in layers(q)) <= sum(x.nbytes() for x in layers(want)) + extra


def test_widths_may_differ() -> None:
    torch.manual_seed(0)
    model, x = Attention("matmul", narrow=16).eval(), torch.randn(2, 24, 32)
    q = quantized(model, (x,), **TOKENS)  # one head of keys for two of queries
    assert products(q, x) == 2
    torch.testing.assert_close(q(x), q.graph(x), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("form, count", [("read by a sum", 4), ("other codes", 3), ("called twice", 5), ("grouped", 4)])
def test_not_joined(monkeypatch: pytest.MonkeyPatch, form: str, count: int) -> None:
    """Other readers, other codes (of v), a weight that two layers share (q's), and what copies a slice."""
    torch.manual_seed(0)
    narrow = 16 if form == "grouped" else 32
    model, x = Attention(form, narrow=narrow).eval(), torch.randn(2, 24, 32)
    q, want = quantized(model, (x,), **TOKENS), apart(monkeypatch, model, (x,), **TOKENS)
    torch.testing.assert_close(q(x), want(x), atol=1e-6, rtol=1e-6)
    calls = [n for n in q.lowered.graph.nodes if n.target is dynamic_layer]
    assert products(q, x) <= products(want, x)
    joined = [n for n in calls if str(n.args[2].target).startswith("joined")]
    assert len(joined) == (form == "other codes")  # of q and k
    if form == "called twice":
        assert len({id(x.weight) for x in layers(q)}) < len(layers(q))
    assert count >= products(q, x)


def test_any_sizes_and_threads_of_use(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    q = quantized(Attention().eval(), (torch.randn(2, 24, 32),), dynamic=dims, **TOKENS)
    assert attention in {n.target for n in q.lowered.graph.nodes}
    save(q, tmp_path / "q")
    again, copied = load(tmp_path / "q"), copy.deepcopy(q)
    for batch, rows in ((3, 5), (1, 24), (4, 1), (2, 130)):
        x = torch.randn(batch, rows, 32)
        y = q(x)
        assert products(q, x) == 2
        torch.testing.assert_close(y, q.graph(x), atol=2e-3, rtol=2e-3)
        assert torch.equal(again(x), y) and torch.equal(copied(x), y)


@pytest.mark.skipif(not HAS_OPAQUE, reason="torch breaks the graph at each layer")
def test_compiled() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32)
    q = quantized(Attention().eval(), (x,), **TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(q, fullgraph=True)(x), q(x), atol=2e-3, rtol=2e-3)
    torch._dynamo.reset()


def test_a_split_is_of_the_last_dimension_alone() -> None:
    a = torch.empty(2, 3, 8)
    assert _dynamic_joined._only_last(a, torch.empty(2, 3, 2, 4)) and _dynamic_joined._only_last(a, a)
    for shape in ((6, 8), (2, 3, 8, 1, 2), (2, 24), (3, 2, 8), (2, 3)):
        assert not _dynamic_joined._only_last(a, torch.empty(shape))
