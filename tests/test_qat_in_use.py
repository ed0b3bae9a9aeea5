"""Quantization-aware training as models and training loops use it: calls by name, layers at rest, averaged weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import CalibrationError, IncWarning
from inc_graph.quantization import convert, freeze_observers, prepare_qat

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.e, self.c = nn.Linear(8, 8), nn.Embedding(10, 8), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(input=x) + self.e(input=torch.arange(len(x))) + self.c(input=x[..., None])[..., 0]


def test_inputs_by_name() -> None:
    model = prepare_qat(ByName().train(), {"a|e|c": "INT8"})
    trained = model(X)
    trained.sum().backward()
    torch.testing.assert_close(convert(model)(X), trained, rtol=1e-4, atol=1e-4)
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 8)
    layer: Any = prepare_qat(nn.Sequential(conv1d).train(), {"0": "INT8"})[0]  # type: ignore[index]
    assert torch.equal(layer(x=X), layer(X))
    with pytest.raises(TypeError, match=r"Conv1D.forward\(\) needs one argument, 'x'"):
        layer(input=X)
    with pytest.raises(TypeError, match="needs one argument"):
        layer()


class Frozen(nn.Module):
    """A backbone, a head, and a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.back = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head, self.unused = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(x))


@pytest.mark.parametrize("learn_scales", [False, True])
def test_a_layer_that_is_never_called_does_not_hinder_freezing(learn_scales: bool) -> None:
    model: Any = prepare_qat(Frozen().train(), {nn.Linear: "INT8"}, learn_scales=learn_scales)
    with pytest.raises(CalibrationError, match="the input has no range yet"):
        freeze_observers(model)
    model(X)
    with pytest.warns(IncWarning, match="^no training batch has reached unused: not frozen") as said:
        freeze_observers(model)
    assert said[0].filename == __file__
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(3 * X)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model.unused(X)  # which may begin later
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_observers(model)
