"""Who watches operators go by sees those of a converted model: programs that tracers record, and transforms, give the
model's numbers, whichever way its kernels are called."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from inc_graph.errors import LoweringError
from inc_graph.export import export
from inc_graph.lowering._direct import is_direct, is_transformed, is_watched
from inc_graph.lowering._onednn import HAS_OPAQUE
from inc_graph.quantization import (
    DynamicQuantConfig,
    GPTQConfig,
    HQQConfig,
    MixedPrecisionConfig,
    RTNConfig,
    StaticQuantConfig,
    convert,
    prepare,
)

WEIGHTS = {
    "rtn": RTNConfig(group_size=32),
    "act_order": GPTQConfig(act_order=True, group_size=32),
    "fp8": RTNConfig(dtype="fp8_e4m3"),
    "hqq": HQQConfig(group_size=32),
}
PACKED = {
    "static": StaticQuantConfig(),
    "dynamic": DynamicQuantConfig(),
    "bf16": MixedPrecisionConfig(dtype="bf16"),
}
EVERY = {**WEIGHTS, **PACKED}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(1, -1, 4, 16).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q)
        return self.out(F.gelu(y.transpose(1, 2).reshape(-1, 64)))


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))


@functools.cache
def models(name: str, scope: str, kind: type[nn.Module] = Attention) -> tuple[nn.Module, nn.Module]:
    """(float model, the same converted)."""
    torch.manual_seed(0)
    model = kind().eval()
    part: Any = export(copy.deepcopy(model), (inputs(),)) if scope == "graph" else copy.deepcopy(model)
    prepared = prepare(part, EVERY[name])
    prepared(inputs())
    return model, convert(prepared)


def off(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("scope", ["graph", "module"])
@pytest.mark.parametrize("name", EVERY)
def test_a_program_that_make_fx_records_gives_the_numbers_of_the_model(name: str, scope: str) -> None:
    if name in PACKED and not HAS_OPAQUE:
        pytest.skip("no operator takes a packed layer")
    _, model = models(name, scope)
    x = inputs(1)
    want = model(x)
    torch.testing.assert_close(make_fx(model)(inputs())(x), want, rtol=1e-4, atol=1e-5)
    if scope == "graph":
        fake = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)
        torch.testing.assert_close(fake(inputs())(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["graph", "module"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_jit_trace_records_a_weight_only_model(name: str, scope: str) -> None:
    _, model = models(name, scope)
    traced = torch.jit.trace(model, (inputs(),), check_trace=False)
    torch.testing.assert_close(traced(inputs(1)), model(inputs(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_jit_trace_of_packed_layers_is_refused(name: str) -> None:
    _, model = models(name, "graph")
    with pytest.raises(LoweringError, match=r"jit\.trace cannot record"):
        torch.jit.trace(model, (inputs(),), check_trace=False)
    assert model(inputs()).isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_vmap(name: str) -> None:
    if name in PACKED and not HAS_OPAQUE:
        pytest.skip("no operator takes a packed layer")
    _, model = models(name, "module")
    many = torch.stack([inputs(i) for i in range(3)])
    assert off(torch.func.vmap(model)(many), torch.stack([model(x) for x in many])) < 0.01


class Mlp(nn.Sequential):
    """Torch's attention has no forward derivative."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32))


@pytest.mark.parametrize("name", [*WEIGHTS, "bf16"])
def test_derivatives(name: str) -> None:
    float_model, model = models(name, "module", Mlp)
    x, direction = inputs(1), inputs(2)
    derivatives: dict[str, Callable[[nn.Module], Tensor]] = {
        "jvp": lambda m: torch.func.jvp(m, (x,), (direction,))[1],
        "grad": lambda m: torch.func.grad(lambda a: m(a).square().sum())(x),
        "jacrev": lambda m: torch.func.jacrev(m)(x),
        "forward_ad": lambda m: forward(m, x, direction),
    }
    for which, derivative in derivatives.items():
        assert off(derivative(model), derivative(float_model)) < 0.25, which


def forward(model: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent


def test_a_dispatch_mode_sees_the_operators_and_gradients_still_pass() -> None:
    _, model = models("rtn", "module")
    x = inputs().requires_grad_()
    with FlopCounterMode(display=False):
        model(x).sum().backward()
    assert x.grad is not None
    seen, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, seen)


def test_what_is_watched() -> None:
    x = inputs()
    assert is_direct(x) and not is_watched()
    assert not is_direct(nn.Parameter(x)) and not is_direct(x.to("meta"))
    seen: list[tuple[bool, bool]] = []

    def probe(a: Tensor) -> Tensor:
        seen.append((is_direct(a), is_transformed()))
        return a * 2

    make_fx(probe)(x)
    torch.jit.trace(probe, (x,), check_trace=False)
    with FlopCounterMode(display=False):
        probe(x)
    torch.func.vmap(probe)(x)
    torch.func.grad(lambda a: probe(a).sum())(x)
    with forward_ad.dual_level():
        probe(x)
    assert seen == [(False, False)] * 3 + [(False, True)] * 3
    assert is_direct(x)
