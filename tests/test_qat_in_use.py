"""Quantization-aware training as models and training loops use it: calls by name, layers at rest, averaged weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.quantization import convert, prepare_qat

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
