"""GPTQ's compiled inner loops and those on torch operators: the same algorithm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inc_graph.passes.qparams import _columns
from inc_graph.passes.qparams._columns_native import ColumnKernels, column_kernels
from inc_graph.passes.qparams._levels import levels_of
from inc_graph.passes.qparams.gptq import GPTQ
from inc_graph.spec import PerChannel, PerGroup, QSpec
from inc_graph.weights import Codes, Gram


def _has_compiler() -> bool:
    levels = levels_of(QSpec("int4", "symmetric", PerChannel(0)))
    return column_kernels(levels, torch.zeros(2, 2), torch.ones(1, 2), None, [0, 0]) is not None


pytestmark = pytest.mark.skipif(not _has_compiler(), reason="there is no C compiler")


def problem(out: int, inputs: int, seed: int) -> tuple[Tensor, Gram]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(4 * inputs + 8, inputs, generator=g) @ mix * (0.2 + torch.rand(inputs, generator=g))
    return torch.randn(out, inputs, generator=g), Gram(x.t() @ x, len(x))


def both(algorithm: GPTQ, weight: Tensor, spec: QSpec, gram: Gram) -> tuple[Codes, Codes]:
    """By compiled code, by torch operators."""
    fast = algorithm.solve(weight, spec, Gram(gram.matrix, gram.count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_columns, "column_kernels", lambda *a: None)
        slow = algorithm.solve(weight, spec, Gram(gram.matrix, gram.count))
    return fast, slow


def cost(codes: Codes, weight: Tensor, gram: Gram) -> float:
    off = (codes.values() - weight).double()
    return float(((off @ gram.matrix.double()) * off).sum())


@given(
    out=st.integers(1, 40),
    inputs=st.sampled_from([1, 7, 32, 64, 100, 129, 160, 300]),
    size=st.sampled_from([8, 32, 48, 150, -1]),
    qtype=st.sampled_from(["int2", "int3", "int4", "int5", "int8", "uint2", "uint4", "uint8"]),
    options=st.sampled_from(
        [
            {},
            {"act_order": True},
            {"static_groups": True},
            {"act_order": True, "static_groups": True},
            {"hybrid_order": True},
        ]
    ),
    search=st.booleans(),
    refine=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_the_same_error_of_outputs(
    out: int, inputs: int, size: int, qtype: str, options: dict[str, bool], search: bool, refine: int, seed: int
) -> None:
    weight, gram = problem(out, inputs, seed)
    size = min(size, inputs)
    granularity: Any = PerGroup(size) if size > 0 else PerChannel(0)
    spec = QSpec(qtype, "asymmetric" if qtype.startswith("u") else "symmetric", granularity)
    fast, slow = both(GPTQ(search=search, refine=refine, **options), weight, spec, gram)
    have, wanted = cost(fast, weight, gram), cost(slow, weight, gram)
    room = 1.25 if weight.numel() > 1000 else 3.0  # a tie may fall another way: a large share of a small weight
    assert have <= wanted * room + 1e-5 * float((weight @ gram.matrix * weight).sum())
    assert fast.notes["error"] == pytest.approx(slow.notes["error"], rel=room - 1, abs=3e-3)
    if fast.order is not None:
        assert slow.order is not None and torch.equal(fast.order, slow.order)


def test_the_same_codes_but_for_ties() -> None:
    weight, gram = problem(64, 256, 0)
    for qtype, scheme in (("int4", "symmetric"), ("uint4", "asymmetric"), ("int3", "symmetric")):
        spec = QSpec(qtype, scheme, PerGroup(32))  # type: ignore[arg-type]
        fast, slow = both(GPTQ(refine=0), weight, spec, gram)
        assert float((fast.carrier == slow.carrier).double().mean()) > 0.99
        assert float((fast.scale == slow.scale).double().mean()) > 0.99  # type: ignore[union-attr]


def test_integers_are_rounded_by_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("compensate", "descend"):
        real = getattr(ColumnKernels, name)

        def spy(self: ColumnKernels, *args: Any, real: Any = real, name: str = name) -> Any:
            calls.append(name)
            return real(self, *args)

        monkeypatch.setattr(ColumnKernels, name, spy)
    weight, gram = problem(16, 256, 0)
    GPTQ().solve(weight, QSpec("int4", "symmetric", PerGroup(32)), gram)
    assert calls == ["compensate"] * 2 + ["descend"] * 2  # 256 columns in blocks of 128
    calls.clear()
    GPTQ().solve(weight, QSpec("nf4", "symmetric", PerGroup(32)), gram)  # a table: by torch operators
    assert calls == []


def test_threads_do_not_change_the_result() -> None:
    weight, gram = problem(100, 200, 0)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            job = GPTQ(search=True).solve(
                weight, QSpec("int4", "symmetric", PerGroup(32)), Gram(gram.matrix, gram.count)
            )
            found.append(job.carrier)
    finally:
        torch.set_num_threads(threads)
    assert float((found[0] == found[1]).double().mean()) > 0.99 and float((found[0] == found[2]).double().mean()) > 0.99
