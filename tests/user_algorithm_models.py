"""A method of one's own, for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from inc_graph.algorithms import Quantizer, algos_mapping, get_quantizer, postprocess_model, register_algo
from inc_graph.algorithms.entries import OFFERS_LOAD
from inc_graph.common.base_config import BaseConfig, register_config
from inc_graph.common.utils import Mode
from inc_graph.quantization.fields import Field, an_int
from inc_graph.registry import CONFIGS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc10, self.norm, self.fc2 = (
            nn.Linear(8, 16),
            nn.Linear(16, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(torch.relu(self.fc10(torch.relu(self.fc1(x))))))


class Codes(nn.Module):
    """A linear layer whose weight is codes and a scale; it also clips its input to what was seen."""

    def __init__(self, linear: nn.Linear, bits: int, seen: float) -> None:
        super().__init__()
        high = 2 ** (bits - 1) - 1
        scale = linear.weight.detach().abs().amax().clamp(min=1e-6) / high
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("limit", torch.tensor(float(seen)))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.clamp(-self.limit, self.limit), self.codes * self.scale, self.bias)


class RoundQuantizer(Quantizer):
    """`quant_config`: path -> bits."""

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        self.seen = dict.fromkeys(self.quant_config, 0.0)
        self.hooks = [
            model.get_submodule(p).register_forward_pre_hook(self._watch(p)) for p in self.quant_config
        ]  # fmt: skip
        return model

    def _watch(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.seen[path] = max(self.seen[path], float(inputs[0].abs().max()))

        return hook

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        for hook in self.hooks:
            hook.remove()
        for path, bits in self.quant_config.items():
            model.set_submodule(path, Codes(model.get_submodule(path), bits, self.seen[path] or float("inf")))
        return model


class RoundConfig(BaseConfig):
    fields: ClassVar[dict[str, Field]] = {"bits": Field(8, an_int(2, 8)), "dtype": Field("int")}
    operators: ClassVar[tuple[Any, ...]] = (nn.Linear,)
    tuning: ClassVar[dict[str, list[Any]]] = {"bits": [2, 8]}

    def leaves_float(self) -> bool:
        return self.dtype == "fp32"


CALLS: list[tuple[Mode, dict[Any, Any], dict[str, Any]]] = []


def entry(model: nn.Module, configs_mapping: Any, mode: Mode = Mode.QUANTIZE, *args: Any, **kwargs: Any) -> nn.Module:
    CALLS.append((mode, configs_mapping, kwargs))
    bits = {
        path: c.bits for (path, _), c in configs_mapping.items() if c.name == "round_own" and not c.leaves_float()
    }  # fmt: skip
    quantizer = get_quantizer(model, RoundQuantizer, bits)
    model = quantizer.execute(model, mode, *args, **kwargs)
    postprocess_model(model, mode, quantizer)
    return model


def bits_of(model: nn.Module) -> dict[str, int]:
    """Path -> bits of the layers that the method has replaced."""
    widths = {n: int(m.codes.abs().max()) for n, m in model.named_modules() if isinstance(m, Codes)}
    return {n: int(v).bit_length() + 1 for n, v in widths.items()}


@pytest.fixture(autouse=True)
def own_method() -> Iterator[None]:
    """The method is entered; whatever else a test enters is gone after it."""
    entries, configs = dict(algos_mapping), set(CONFIGS.names())
    register_config(algo_name="round_own", priority=95)(RoundConfig)
    register_algo("round_own")(entry)
    CALLS.clear()
    with torch.no_grad():
        yield
    OFFERS_LOAD.clear()
    algos_mapping.clear()
    algos_mapping.update(entries)
    for name in set(CONFIGS.names()) - configs:
        CONFIGS.remove(name)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(32, 8)
