"""Models that an own method has converted, alone or beside one of the library, are saved and loaded like others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from inc_graph.algorithms import Quantizer, algos_mapping, register_algo
from inc_graph.common.base_config import BaseConfig, register_config
from inc_graph.errors import SavedModelError
from inc_graph.quantization import StaticQuantConfig, load, quantize
from inc_graph.quantization.fields import Field, an_int
from inc_graph.registry import CONFIGS

NAME = "saved_rounding"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.relu(self.first(x))))


class Rounded(nn.Module):
    """Weights on a grid; the codes are the only copy."""

    def __init__(self, linear: nn.Linear, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("codes", (linear.weight.detach() * steps).round().to(torch.int8))
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.float() / self.steps, self.bias)


class RoundingQuantizer(Quantizer):
    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return model

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        for (path, _), config in self.quant_config.items():
            if config.name == NAME:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, Rounded(model.get_submodule(path), config.steps))
        return model


@pytest.fixture
def config() -> Iterator[type[BaseConfig]]:
    @register_config(algo_name=NAME)
    class RoundingConfig(BaseConfig):
        fields: ClassVar = {"steps": Field(16, an_int(1, 64), "Steps in 1."), **BaseConfig.fields}
        operators: ClassVar = (nn.Linear,)

    @register_algo(NAME)
    def entry(model: nn.Module, configs_mapping: Any, mode: Any, *args: Any, **kwargs: Any) -> nn.Module:
        return RoundingQuantizer(configs_mapping).execute(model, mode=mode)

    yield RoundingConfig
    algos_mapping.pop(NAME, None)
    if NAME in CONFIGS:
        CONFIGS.remove(NAME)


def test_alone(config: Any, tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    q = quantize(Net().eval(), config(steps=8).set_local("last", config(steps=32)))
    assert isinstance(q.first, Rounded) and (q.first.steps, q.last.steps) == (8, 32)
    q.save(tmp_path)
    original = Net()
    loaded = load(tmp_path, original)
    assert torch.equal(loaded(x), q(x)) and loaded.last.steps == 32
    assert isinstance(original.first, nn.Linear)  # the float model is left alone here
    loaded.save(tmp_path)
    assert torch.equal(load(tmp_path, Net)(x), q(x))


def test_beside_the_library(config: Any, tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    q = quantize(Net().eval(), config(white_list=["first"]) + StaticQuantConfig(white_list=["last"]), lambda p: p(x))
    assert isinstance(q.first, Rounded) and hasattr(q.last, "inner")
    q.save(tmp_path)
    loaded = load(tmp_path, Net())
    assert torch.equal(loaded(x), q(x)) and loaded.report.count("linear") == 1


def test_without_the_method(config: Any, tmp_path: Path) -> None:
    q = quantize(Net().eval(), config())
    q.save(tmp_path)
    del algos_mapping[NAME]
    original = Net()
    with pytest.raises(SavedModelError, match=NAME):
        load(tmp_path, original)
    CONFIGS.remove(NAME)
    with pytest.raises(SavedModelError, match=NAME):
        load(tmp_path, original)
    assert isinstance(original.first, nn.Linear)
