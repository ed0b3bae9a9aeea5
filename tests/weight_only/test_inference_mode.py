"""Whoever works within `torch.inference_mode()` gets a model of ordinary tensors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.quantization import GPTQConfig, HQQConfig, RTNConfig, convert, load, prepare, quantize
from tests.weight_only_models import tensors

X = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
CONFIGS = [RTNConfig(group_size=16), HQQConfig(group_size=8), GPTQConfig(group_size=16)]
EXAMPLES: list[Any] = [None, (X,)]


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def check(model: nn.Module) -> None:
    assert not [name for name, t in tensors(model).items() if t.is_inference()]
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    model.to(torch.float64)


def rounded(config: Any, example: Any, model: nn.Module | None = None) -> nn.Module:
    model = made() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize(model, config, lambda m: m(X), example_inputs=example)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("example", EXAMPLES, ids=["layers", "graph"])
def test_quantize_in_inference_mode(config: Any, example: Any) -> None:
    model = made()
    with torch.inference_mode():
        model = rounded(config, example, model)
        got = model(X)
        assert got.is_inference()  # the mode is what it was
    assert torch.equal(got, rounded(config, example)(X))
    check(model)


@pytest.mark.parametrize("within", ["prepare", "calibrate", "convert"])
def test_one_step_of_three_in_inference_mode(within: str) -> None:
    model = made()
    with torch.inference_mode(within == "prepare"):
        prepared = prepare(model, GPTQConfig(group_size=16))
    with torch.inference_mode(within == "calibrate"):
        prepared(X)
    with torch.inference_mode(within == "convert"):
        model = convert(prepared)
    check(model)


@pytest.mark.parametrize("example", EXAMPLES, ids=["layers", "graph"])
def test_load_in_inference_mode(example: Any, tmp_path: Path) -> None:
    model: Any = rounded(RTNConfig(group_size=16), example)
    model.save(tmp_path)
    original = None if example else made()
    with torch.inference_mode():
        back = load(tmp_path, original)
    assert torch.equal(back(X), model(X))
    check(back)


def test_gradients_are_as_they_were() -> None:
    seen = []

    def run(model: nn.Module) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return model(X)

    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        float_model = made()
        with mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize(float_model, GPTQConfig(group_size=16), run)
    assert seen == [(False, False), (False, False), (True, False)]


def test_a_model_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = quantize(made(), RTNConfig(group_size=16))
        assert torch.equal(model(X), quantize(made(), RTNConfig(group_size=16))(X))
