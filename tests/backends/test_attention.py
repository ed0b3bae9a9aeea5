"""Attention as one compiled pass: against torch's in double precision, what it leaves to torch, what is claimed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.lowering import _attention
from inc_graph.lowering._attention import attention, taken
from inc_graph.quantization import DynamicQuantConfig, quantize

TOKENS: dict[str, Any] = {"act_granularity": "per_token", "w_granularity": "per_channel"}
MASKS = ("none", "causal", "seen", "seen rows", "seen by all", "added", "added to heads", "one column")
native = pytest.mark.skipif(_attention._kernel() is None, reason="no C compiler, or no AVX-512")


def heads(batch: int, count: int, rows: int, size: int, layout: str, g: torch.Generator) -> Tensor:
    if layout == "beside each other":
        return torch.randn(batch, rows, count, size, generator=g).transpose(1, 2)
    if layout == "slice":
        return torch.randn(batch, rows, 3, count, size, generator=g)[:, :, 1].transpose(1, 2)
    return torch.randn(batch, count, rows, size, generator=g)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, is_causal=causal, scale=scale)


@native
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 3),
    queries=st.integers(8, 130),
    keys=st.integers(1, 130),
    size=st.sampled_from([16, 32, 48, 64, 80, 128]),
    layout=st.sampled_from(["dense", "beside each other", "slice"]),
    mask=st.sampled_from(
        ["none", "causal", "seen", "seen rows", "seen by all", "added", "added to heads", "one column"]
    ),
    scale=st.sampled_from([None, 0.01, 0.3, 20.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_it_is_attention(
    batch: int, count: int, queries: int, keys: int, size: int, layout: str, mask: str, scale: float | None, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    q = heads(batch, count, queries, size, layout, g)
    k, v = (heads(batch, count, keys, size, layout, g) for _ in range(2))
    masks = {
        "seen": torch.rand(batch, count, queries, keys, generator=g) < 0.7,
        "seen rows": (torch.rand(batch, 1, 1, keys, generator=g) < 0.7).expand(batch, 1, queries, keys),
        "seen by all": torch.rand(queries, keys, generator=g) < 0.7,
        "added": torch.randn(batch, count, queries, 2 * keys, generator=g)[..., ::2],
        "added to heads": torch.randn(count, 1, keys, generator=g) * 30,
        "one column": torch.randn(batch, 1, queries, 1, generator=g),
    }
    args = (masks.get(mask), scale, mask == "causal")
    taken.clear()
    y, want = attention(q, k, v, *args), exact(q, k, v, *args)
    assert taken == {"native": 1}
    theirs = F.scaled_dot_product_attention(q, k, v, args[0], is_causal=args[2], scale=scale)
    assert y.shape == theirs.shape and y.dtype == theirs.dtype
    assert y.transpose(1, 2).is_contiguous()
    largest = (q @ k.transpose(2, 3)).abs().max() * (size**-0.5 if scale is None else scale)  # score: its last place is
    assert (y - want).norm() <= (2e-6 + 2e-7 * largest) * want.norm() + 2 * (theirs - want).norm()  # that of a weight


@native
def test_who_sees_nothing_gets_zeros() -> None:
    q = k = v = torch.randn(1, 2, 9, 16)
    seen = torch.ones(9, 9, dtype=torch.bool)
    seen[3] = False
    added = torch.zeros(9, 9).masked_fill(~seen, float("-inf"))
    lowest = torch.zeros(9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added, lowest):
        y, want = attention(q, k, v, mask, None, False), exact(q, k, v, mask, None, False)
        torch.testing.assert_close(y, want.float())
        assert bool((y[:, :, 3] == 0).all()) == (mask is not lowest)


@native
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_odd_numbers_go_where_they_do_in_torch(odd: float) -> None:
    torch.manual_seed(0)
    for place in range(3):
        qkv = [torch.randn(1, 2, 20, 32) for _ in range(3)]
        qkv[place][0, 1, 7, 3] = odd
        y, theirs = attention(*qkv, None, None, False), F.scaled_dot_product_attention(*qkv)
        torch.testing.assert_close(y, theirs, equal_nan=True)


@native
def test_any_number_of_threads_gives_the_same() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 500, 64) for _ in range(3))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attention(q, k, v, None, None, True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_torch_computes_what_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def three(*shape: int, **kind: Any) -> list[Tensor]:
        return [torch.randn(*shape, **kind) for _ in range(3)]

    cases = (
        three(1, 2, 9, 16, dtype=torch.bfloat16),
        three(1, 2, 9, 20),
        three(2, 9, 16),
        three(1, 2, 3, 16),
        three(1, 2, 9, 32, requires_grad=True),
        [x.transpose(2, 3) for x in three(1, 2, 16, 16)],
        [x[..., ::2] for x in three(1, 2, 9, 32)],
        [torch.randn(1, 2, 9, 16), *three(1, 1, 9, 16)[1:]],
        [torch.randn(0, 2, 9, 16)] * 3,
    )
    taken.clear()
    for case in cases:
        torch.testing.assert_close(attention(*case, None, None, False), F.scaled_dot_product_attention(*case))
    assert taken == {"torch": len(cases)}
    monkeypatch.setenv("INC_NATIVE", "0")
    q, k, v = three(1, 2, 9, 16)
    assert torch.equal(attention(q, k, v, None, None, True), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert taken == {"torch": len(cases) + 1}
    with pytest.raises(RuntimeError):  # as torch says it
        attention(q, k, v, torch.zeros(7, 7), None, False)


# --------------------------------------------------------------------------------------------------------- in a graph
class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.options = nn.Linear(32, 96), nn.Linear(32, 32), options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, mask, **self.options)
        return self.out(y.transpose(1, 2).flatten(2))


def lowered(model: nn.Module, *args: Tensor, dynamic: Any = None) -> Any:
    torch.manual_seed(0)
    return quantize(export(model.eval(), args, dynamic_shapes=dynamic), DynamicQuantConfig(**TOKENS))


def targets(q: Any) -> set[Any]:
    return {n.target for n in q.lowered.graph.nodes}


def test_it_is_claimed() -> None:
    x, mask = torch.randn(2, 12, 32), torch.rand(2, 1, 1, 12) < 0.8
    for args, options in (((x,), {}), ((x, mask), {"scale": 0.1}), ((x,), {"is_causal": True})):
        q = lowered(Net(**options), *args)
        assert attention in targets(q) and torch.ops.aten.scaled_dot_product_attention.default not in targets(q)
        taken.clear()
        torch.testing.assert_close(q(*args), q.graph(*args), atol=1e-3, rtol=1e-2)
        assert sum(taken.values()) == 1


def test_what_it_is_not_claimed_for() -> None:
    x = torch.randn(2, 12, 32)
    assert attention not in targets(lowered(Net(dropout_p=0.1), x))
    half = Net().to(torch.bfloat16)
    assert attention not in targets(lowered(half, x.to(torch.bfloat16)))

    class Narrow(Net):  # heads of 8
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Grouped(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
            return self.out(y.transpose(1, 2).flatten(2))

    for model in (Narrow(), Grouped()):
        q = lowered(model, x)
        assert attention not in targets(q)
        torch.testing.assert_close(q(x), q.graph(x), atol=1e-3, rtol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_sizes_and_compiled() -> None:
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    q = lowered(Net(is_causal=True), torch.randn(2, 12, 32), dynamic=dims)
    assert attention in targets(q)
    for rows in (3, 12, 77):
        x = torch.randn(rows, rows, 32)
        torch.testing.assert_close(q(x), q.graph(x), atol=2e-3, rtol=2e-2)
    with torch.no_grad():
        taken.clear()
        torch.testing.assert_close(torch.compile(q)(x), q(x), atol=1e-3, rtol=1e-2)
        assert sum(taken.values()) == 2
    torch._dynamo.reset()
