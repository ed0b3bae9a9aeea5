"""Weights of any size: what is reported of them is true, and codes are those of the same weights at another size."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inc_graph.passes._codes import codes_of_weight
from inc_graph.quantization import GPTQConfig, HQQConfig, RTNConfig, quantize
from inc_graph.spec import PerGroup, QSpec
from inc_graph.weights import Codes, Gram

ALGORITHMS = {
    "rtn": ("int4", "symmetric"),
    "rtn{search=true}": ("int4", "symmetric"),
    "rtn{scale_type=int8}": ("int4", "asymmetric"),
    "gptq": ("int4", "symmetric"),
    "gptq{search=true}": ("uint4", "asymmetric"),
    "gptq{fp8_aware=true}": ("int4", "symmetric"),
    "hqq": ("uint4", "asymmetric"),
}
SIZES = [-120, -85, -60, 0, 60, 90, 120]


def weight(exponent: int) -> Tensor:
    return torch.ldexp(torch.randn(12, 32, generator=torch.Generator().manual_seed(0)), torch.tensor(exponent))


def gram() -> Gram:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    return Gram(x.T @ x, 200)


def solved(algorithm: str, exponent: int) -> Codes:
    qtype, scheme = ALGORITHMS[algorithm]
    spec = QSpec(qtype, scheme, PerGroup(16))
    return codes_of_weight(weight(exponent), {"spec": spec.to_json(), "algorithm": algorithm}, gram())


def error(w: Tensor, codes: Codes, matrix: Tensor, exponent: int) -> float:
    """Relative, in float64, at the size of 1."""
    unit = 2.0**-exponent
    w, off = w.double() * unit, (codes.values().double() - w.double()) * unit
    return math.sqrt(float(((off @ matrix.double()) * off).sum()) / float(((w @ matrix.double()) * w).sum()))


@pytest.mark.parametrize("exponent", SIZES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_error_is_the_true_one_and_the_same_at_every_size(algorithm: str, exponent: int) -> None:
    codes = solved(algorithm, exponent)
    matrix = gram().matrix if algorithm.startswith("gptq") else torch.eye(32)
    found = error(weight(exponent), codes, matrix, exponent)
    assert codes.notes["error"] == pytest.approx(found, rel=0.02)
    assert 0.01 < found < 0.35
    if exponent > -100:  # double quantized scales are too small to be held there
        assert codes.notes["error"] == pytest.approx(solved(algorithm, 0).notes["error"], rel=0.02)
    if "rtn_error" in codes.notes and "fp8" not in algorithm:
        assert codes.notes["error"] <= codes.notes["rtn_error"] * 1.0001
    if "fp8" in algorithm:
        assert codes.notes["fp8_scale"] == math.ldexp(solved(algorithm, 0).notes["fp8_scale"], exponent)


@settings(max_examples=30, deadline=None)
@given(st.integers(-148, 127), st.sampled_from(["rtn", "gptq"]))
def test_whatever_the_size_nothing_false_is_said(exponent: int, algorithm: str) -> None:
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(exponent + 200)).clamp(-1.9, 1.9).double()
    w = (w * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)).float()
    if not bool(w.isfinite().all()) or not bool(w.any()):
        return
    spec = QSpec("int4", "symmetric", PerGroup(16))
    codes = codes_of_weight(w, {"spec": spec.to_json(), "algorithm": algorithm}, gram())
    assert codes.values().isfinite().all()
    matrix = gram().matrix if algorithm == "gptq" else torch.eye(32)
    unit = -exponent
    scaled = [t.double() * 2.0 ** (unit // 2) * 2.0 ** (unit - unit // 2) for t in (w, codes.values())]
    off, whole = scaled[1] - scaled[0], scaled[0]
    want = math.sqrt(float(((off @ matrix.double()) * off).sum()) / float(((whole @ matrix.double()) * whole).sum()))
    assert codes.notes["error"] == pytest.approx(want, rel=0.02, abs=1e-6)


@pytest.mark.parametrize("config", [RTNConfig(group_size=16), GPTQConfig(group_size=16), HQQConfig(group_size=16)],
                         ids=lambda c: c.name)  # fmt: skip
@pytest.mark.parametrize("size", [1e-25, 1e-36, 1e25])
def test_models_say_so_too(config: Any, size: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).eval()
    x = torch.randn(128, 32)
    plain = quantize(copy.deepcopy(model), config, lambda m: m(x))
    with torch.no_grad():
        model[0].weight.mul_(size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q: Any = quantize(copy.deepcopy(model), config, lambda m: m(x))
    line, want = q.report.weights[0], plain.report.weights[0]
    assert line.error == pytest.approx(want.error, rel=0.05) and line.error > 0.02
