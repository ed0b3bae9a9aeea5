"""GPTQ against the published algorithm written out, against plain rounding, and on Hessians that are awkward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inc_graph.errors import CalibrationError, ConfigError
from inc_graph.ops import DEQUANTIZE
from inc_graph.options import make_algorithm
from inc_graph.passes.qparams.gptq import GPTQ
from inc_graph.passes.qparams.rtn import RTN
from inc_graph.spec import PerChannel, PerGroup, PerTensor, QSpec
from inc_graph.weights import Codes, Gram

INT4 = QSpec("int4", "symmetric", PerGroup(16))
UINT4 = QSpec("uint4", "asymmetric", PerGroup(16))
ORDERS: list[dict[str, Any]] = [
    {},
    {"act_order": True},
    {"act_order": True, "static_groups": True},
    {"hybrid_order": True},
    {"hybrid_order": True, "static_groups": True},
    {"static_groups": True},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems as small as these take longer with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs, some channels much larger than others."""
    mix = normal(width, width, seed=seed + 1) / math.sqrt(width) + torch.eye(width)
    return normal(count, width, seed=seed) @ mix * torch.exp(0.7 * normal(width, seed=seed + 2))


def gram(x: Tensor) -> Gram:
    return Gram(x.T @ x, len(x))


def cost(codes: Codes, weight: Tensor, x: Tensor, rows: bool = False) -> Any:
    """Squared error of the outputs."""
    off = (x.double() @ (codes.values() - weight).double().T).square().sum(0)
    return off if rows else float(off.sum())


def check(codes: Codes, weight: Tensor, spec: QSpec) -> None:
    """Codes are in range, shaped as they should be, and mean what `values` says."""
    assert codes.carrier.shape == weight.shape and codes.carrier.is_contiguous() and codes.spec == spec
    scale, zero = codes.params()
    assert bool(scale.isfinite().all()) and bool((scale != 0).all())
    if spec.type.is_int:
        assert int(codes.carrier.min()) >= spec.type.qmin and int(codes.carrier.max()) <= spec.type.qmax
    values = DEQUANTIZE(codes.carrier, scale, zero, list(spec.block(2)), spec.qtype, torch.float32)
    if codes.order is not None:
        assert torch.equal(codes.order.sort().values, torch.arange(weight.shape[1]))
        x = normal(3, weight.shape[1])
        torch.testing.assert_close(x[:, codes.order] @ values.T, x @ codes.values().T)
    else:
        assert torch.equal(values, codes.values())


# --------------------------------------------------------------------------------------------------- as published
def published(weight: Tensor, h: Tensor, size: int, damping: float) -> Tensor:
    """Levels of symmetric 4-bit codes, one column after another, by eliminating it from the inverse; float64."""
    w, h = weight.double().clone(), h.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    levels = torch.zeros_like(w)
    for j in range(w.shape[1]):
        if j % size == 0:
            low, high = w[:, j : j + size].amin(1), w[:, j : j + size].amax(1)
            scale = torch.where(high > -low, -high, -low) / 8
            scale = scale.to(torch.float16).double()  # as it is kept
        levels[:, j] = torch.round(w[:, j] / scale).clamp(-8, 7)
        error = (w[:, j] - levels[:, j] * scale) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return levels


@pytest.mark.parametrize(("size", "block"), [(16, 128), (16, 8), (12, 20), (50, 32), (100, 7)])
def test_without_refinement_it_is_the_published_algorithm(size: int, block: int) -> None:
    weight, x = normal(24, 100), inputs(400, 100)
    found = GPTQ(refine=0, block_size=block).solve(weight, QSpec("int4", "symmetric", PerGroup(size)), gram(x))
    same = found.carrier.double() == published(weight, gram(x).matrix, size, 0.01)
    worse = cost(found, weight, x, rows=True)  # a row that plain rounding suits better has its codes
    plain = RTN().solve(weight, QSpec("int4", "symmetric", PerGroup(size)))
    replaced = (found.carrier == plain.carrier).all(1)
    assert float(same[~replaced].double().mean()) > 0.995
    assert bool((worse <= cost(plain, weight, x, rows=True) * 1.001).all())
    assert int(replaced.sum()) < 12


def test_refinement_lowers_the_error_each_time() -> None:
    weight, x = normal(64, 128), inputs(600, 128)
    for spec in (INT4, UINT4, QSpec("nf4", "symmetric", PerGroup(32))):
        for search in (False, True):
            errors = [cost(GPTQ(refine=n, search=search).solve(weight, spec, gram(x)), weight, x) for n in range(4)]
            assert errors[1] < errors[0] and errors[2] < errors[1] and errors[3] < errors[2] * 1.002
            assert errors[2] < 0.95 * errors[0]


# ------------------------------------------------------------------------------------------------- plain rounding
@given(st.data())
@settings(max_examples=80)
def test_never_worse_than_plain_rounding(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 48))
    seed = data.draw(st.integers(0, 999))
    weight = normal(rows, width, seed=seed) * 2.0 ** data.draw(st.integers(-6, 3))
    x = inputs(4 * width + 8, width, seed)
    qtype = data.draw(st.sampled_from(["int2", "int3", "int4", "uint4", "int8", "uint3", "nf4", "fp4", "fp8_e4m3"]))
    scheme = data.draw(st.sampled_from(["symmetric", "asymmetric"])) if "int" in qtype else "symmetric"
    size = data.draw(st.one_of(st.just(-1), st.integers(1, width)))
    spec = QSpec(qtype, scheme, PerGroup(size))
    options = dict(data.draw(st.sampled_from(ORDERS)), search=data.draw(st.booleans()))
    scales = data.draw(st.sampled_from([{}, {}, {"scale_type": "int8"}, {"scale_type": "uint4", "scale_group": 8}]))
    found = GPTQ(**options, **scales, refine=data.draw(st.integers(0, 2))).solve(weight, spec, gram(x))
    plain = RTN(search=options["search"], **scales).solve(weight, spec)
    check(found, weight, spec)
    slack = 1e-4 * float((x @ weight.T).square().sum()) * 1e-3
    assert cost(found, weight, x) <= cost(plain, weight, x) * 1.001 + slack
    if found.order is None and not scales:
        assert bool((cost(found, weight, x, True) <= cost(plain, weight, x, True) * 1.001 + slack).all())


@pytest.mark.parametrize("options", ORDERS)
def test_much_better_where_inputs_are_correlated(options: dict[str, Any]) -> None:
    weight, x = normal(48, 128), inputs(600, 128)
    for spec in (INT4, UINT4):
        found, plain = GPTQ(search=True, **options).solve(weight, spec, gram(x)), RTN(search=True).solve(weight, spec)
        check(found, weight, spec)
        assert cost(found, weight, x) < 0.6 * cost(plain, weight, x)
        notes = found.notes
        energy = float((x @ weight.T).square().sum())
        assert notes["error"] == pytest.approx(math.sqrt(cost(found, weight, x) / energy), rel=1e-2)
        assert notes["rtn_error"] == pytest.approx(math.sqrt(cost(plain, weight, x) / energy), rel=1e-2)
        assert notes["damping"] == 0.01 and "rank" not in notes and "dead" not in notes


# ---------------------------------------------------------------------------------------------------------- orders
def test_which_orders_remain_when_the_model_runs() -> None:
    weight, x = normal(8, 64), inputs(300, 64)
    for options in ORDERS:
        found = GPTQ(**options).solve(weight, INT4, gram(x))
        assert (found.order is not None) == (options == {"act_order": True})
    whole = GPTQ(act_order=True).solve(weight, QSpec("int4", "symmetric", PerGroup(-1)), gram(x))
    assert whole.order is None  # one group: it does not matter what it is made of
    order = GPTQ(act_order=True).solve(weight, INT4, gram(x)).order
    assert order is not None
    assert torch.equal(order, torch.argsort(x.square().sum(0), descending=True))


def test_static_groups_have_the_scales_of_the_weights_as_they_were() -> None:
    weight, x = normal(8, 64), inputs(300, 64)
    for order in ({}, {"act_order": True}, {"hybrid_order": True}):
        found = GPTQ(static_groups=True, refine=0, **order).solve(weight, INT4, gram(x))
        plain = RTN(full_range=True).solve(weight, INT4)
        assert isinstance(found.scale, Tensor) and isinstance(plain.scale, Tensor)
        torch.testing.assert_close(found.scale, plain.scale)


def test_blocks_do_not_change_the_result() -> None:
    weight, x = normal(32, 96), inputs(500, 96)
    results = [cost(GPTQ(block_size=b).solve(weight, UINT4, gram(x)), weight, x) for b in (1, 16, 40, 128, 2048)]
    assert max(results) <= min(results) * 1.05


# -------------------------------------------------------------------------------------------------------- hessians
def test_inputs_that_say_little() -> None:
    weight = normal(16, 48)
    x = inputs(200, 48)
    dead = x.clone()
    dead[:, [3, 17, 40]] = 0
    cases = {
        "dead columns": dead,
        "one sample": x[:1],
        "rank 1": x[:1].expand(50, -1),
        "zeros": torch.zeros(5, 48),
        "equal channels": x[:, :1].expand(-1, 48),
        "tiny": x * 1e-15,
        "huge": x * 1e15,
    }
    ranks = {"dead columns": 45, "one sample": 1, "rank 1": 1, "zeros": 0, "equal channels": 1}
    for name, data in cases.items():
        for options in [*ORDERS, {"search": True}, {"percdamp": 0.0}, {"percdamp": 1e-9}]:
            found = GPTQ(**options).solve(weight, INT4, gram(data))
            check(found, weight, INT4)
            plain = cost(RTN(search=options.get("search", False)).solve(weight, INT4), weight, data)
            assert cost(found, weight, data) <= plain * 1.01 + 1e-9 * float(data.square().sum()), (name, options)
            assert found.notes.get("rank") == ranks.get(name)
            assert found.notes.get("dead") == {"dead columns": 3, "zeros": 48}.get(name), (name, found.notes)
            assert math.isfinite(found.notes["error"])


def test_dead_columns_are_rounded_plainly() -> None:
    weight, x = normal(16, 64), inputs(300, 64)
    x[:, 5] = 0
    found = GPTQ().solve(weight, INT4, gram(x))
    scale = found.params()[0].float().repeat_interleave(16, 1)
    off = (found.values() - weight)[:, 5].abs()
    assert bool((off <= scale[:, 5] * 0.51 + (weight[:, 5].abs() - 7 * scale[:, 5]).clamp(min=0)).all())


def test_more_damping_where_it_does_not_do_without() -> None:
    weight = normal(8, 32)
    few = inputs(4, 32)
    found = GPTQ(percdamp=0.0).solve(weight, INT4, gram(few))
    assert found.notes["damping"] > 0 and found.notes["rank"] == 4
    check(found, weight, INT4)
    assert GPTQ(percdamp=0.0).solve(weight, INT4, gram(inputs(500, 32))).notes["damping"] == 0
    assert GPTQ(percdamp=0.5).solve(weight, INT4, gram(few)).notes["damping"] == 0.5


def test_it_is_deterministic_and_changes_nothing() -> None:
    weight, x = normal(32, 64), gram(inputs(300, 64))
    before, matrix = weight.clone(), x.matrix.clone()
    for options in ORDERS:
        first, second = (GPTQ(search=True, **options).solve(weight, UINT4, x) for _ in range(2))
        assert torch.equal(first.carrier, second.carrier) and torch.equal(first.values(), second.values())
        assert first.notes == second.notes
    assert torch.equal(weight, before) and torch.equal(x.matrix, matrix)


# -------------------------------------------------------------------------------------------------------------- fp8
@pytest.mark.parametrize("qtype", ["int4", "int3", "uint2"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("search", [False, True])
def test_fp8_aware_values_are_numbers_of_fp8(qtype: str, scheme: str, search: bool) -> None:
    weight, x = normal(32, 64) * torch.exp(normal(32, 1, seed=5)), inputs(300, 64)
    weight[0] *= 1e-6  # beyond what fp8 reaches
    spec = QSpec(qtype, scheme, PerGroup(16))
    found = GPTQ(fp8_aware=True, search=search).solve(weight, spec, gram(x))
    check(found, weight, spec)
    scaled = found.values() / found.notes["fp8_scale"]
    assert torch.equal(scaled.to(torch.float8_e4m3fn).float(), scaled)
    assert math.log2(found.notes["fp8_scale"]).is_integer()
    assert cost(found, weight, x) < 4 * cost(RTN().solve(weight, spec), weight, x)


# -------------------------------------------------------------------------------------------------------- bad input
def test_bad_input() -> None:
    weight, x = normal(8, 32), gram(inputs(200, 32))
    for bad in (None, Gram(torch.zeros(32, 32), 0)):
        with pytest.raises(CalibrationError, match="no inputs"):
            GPTQ().solve(weight, INT4, bad)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        GPTQ().solve(weight, INT4, Gram(torch.full((32, 32), math.nan), 4))
    with pytest.raises(CalibrationError, match="32 inputs"):
        GPTQ().solve(weight, INT4, Gram(torch.eye(16), 4))
    with pytest.raises(ConfigError, match=r"group size 64 .* 32"):
        GPTQ().solve(weight, QSpec("int4", "symmetric", PerGroup(64)), x)
    for granularity in (PerGroup(8, 0), PerTensor(), PerChannel(1)):
        with pytest.raises(ConfigError, match="along the inputs"):
            GPTQ().solve(weight, QSpec("int4", "symmetric", granularity), x)
    with pytest.raises(ConfigError, match="along the inputs"):
        GPTQ().solve(normal(4, 2, 3, 3), QSpec("int4", "symmetric", PerChannel(0)), x)
    with pytest.raises(ConfigError, match="at most 4 bits"):
        GPTQ(fp8_aware=True).solve(weight, QSpec("int8", "symmetric", PerGroup(16)), x)
    with pytest.raises(ConfigError, match="int16"):
        GPTQ().solve(weight, QSpec("int16", "symmetric", PerGroup(16)), x)
    for options in (
        {"act_order": True, "hybrid_order": True},
        {"percdamp": -0.1},
        {"percdamp": math.nan},
        {"block_size": 0},
        {"refine": -1},
        {"fp8_aware": True, "scale_type": "int8"},
        {"scale_type": "fp8_e4m3"},
    ):
        with pytest.raises(ConfigError):
            GPTQ(**options)


def test_options_as_text() -> None:
    assert make_algorithm("gptq{act_order=true,percdamp=0.1,scale_type=int8}") == GPTQ(
        act_order=True, percdamp=0.1, scale_type="int8"
    )
    assert GPTQ.inputs and not RTN.inputs
