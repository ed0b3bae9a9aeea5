"""Where values are quantized at run time gradients end, and that is said."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import IncWarning
from inc_graph.export import export
from inc_graph.quantization import DynamicQuantConfig, RTNConfig, StaticQuantConfig, quantize

DYNAMIC = DynamicQuantConfig(act_granularity="per_token", w_granularity="per_channel")


class Around(nn.Module):
    """A residual sum: autograd by itself would give its other addend's gradient for that of the whole."""

    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 32)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.norm(x))
        return x + y if self.residual else y


def quantized(config: Any, exported: bool, backend: str = "auto", residual: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model, x = Around(residual).eval(), torch.randn(4, 32)
    run = (lambda m: m(x)) if isinstance(config, StaticQuantConfig) else None
    given = export(model, (x,)) if exported else model
    made: nn.Module = quantize(given, config, run, backend=backend, example_inputs=None if exported else (x,))
    return made


def backward(model: nn.Module) -> tuple[list[str], Tensor | None]:
    """What is said, and the gradient of the input."""
    x = torch.randn(4, 32, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x).sum().backward()
    return [str(w.message) for w in caught if issubclass(w.category, IncWarning)], x.grad


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("config", [DYNAMIC, StaticQuantConfig()], ids=["dynamic", "static"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_layer_is_named_once(config: Any, exported: bool, backend: str, residual: bool) -> None:
    model = quantized(config, exported, backend, residual)
    said, gradient = backward(model)
    assert len(said) == 1 and "'fc'" in said[0] and "prepare_qat" in said[0]
    if residual and gradient is not None:  # of the way around the layer, unless the sum is a part of its kernel
        assert torch.equal(gradient, torch.ones_like(gradient))
    else:
        assert gradient is None and not (residual and backend == "eager")
    assert backward(model)[0] == []
    assert len(backward(copy.deepcopy(quantized(config, exported, backend, residual)))[0]) == 1


def test_layers_of_one_model_share_the_word() -> None:
    torch.manual_seed(0)
    model = quantize(nn.Sequential(*(Around() for _ in range(3))).eval(), DYNAMIC)
    assert len(backward(model)[0]) == 1


@pytest.mark.parametrize("exported", [True, False])
def test_weights_alone_let_gradients_through(exported: bool) -> None:
    said, gradient = backward(quantized(RTNConfig(), exported, residual=False))
    assert not said and gradient is not None and float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("exported", [True, False])
def test_results_can_be_changed_in_place(exported: bool) -> None:
    model, x = quantized(DYNAMIC, exported, residual=False), torch.randn(4, 32, requires_grad=True)
    with torch.no_grad():
        want = model(x).relu()
    assert torch.equal(model(x).relu_(), want)


class Several(nn.Module):
    """Results that come from codes, from the input, and from a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)
        self.register_buffer("offset", torch.ones(8))

    def forward(self, x: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b = self.fc(x).chunk(2, -1)
        return a, b, free, self.offset


def test_only_what_comes_from_codes_is_marked() -> None:
    torch.manual_seed(0)
    x, free = torch.randn(4, 32, requires_grad=True), torch.randn(3)
    model = quantize(export(Several().eval(), (x.detach(), free)), DYNAMIC)
    *made, same, offset = model(x, free)
    assert all(y.grad_fn is not None for y in made)
    assert not same.requires_grad and not free.requires_grad and not offset.requires_grad
    assert all(not b.requires_grad for b in model.buffers())


def test_nothing_is_recorded_without_gradients() -> None:
    model, x = quantized(DYNAMIC, True, residual=False), torch.randn(4, 32, requires_grad=True)
    with torch.no_grad():
        assert model(x).grad_fn is None
    assert model(x.detach()).grad_fn is None
