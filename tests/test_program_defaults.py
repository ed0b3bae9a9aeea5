"""A program's default dtype, default device and autocast change nothing of what is quantized and computed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.plain import plain
from inc_graph.quantization import (
    DynamicQuantConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    SmoothQuantConfig,
    StaticQuantConfig,
    quantize,
)


class Everything(nn.Module):
    """Linear layers, an LSTM, and attention by heads of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.qkv, self.b = nn.Linear(64, 64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.lstm = nn.LSTM(64, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(torch.relu(self.a(x))).view(*x.shape[:2], 12, 16).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(*heads.split(4, 1)).transpose(1, 2).flatten(2)
        y, _ = self.lstm(y)
        z: Tensor = self.b(y)
        return z


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PROGRAMS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
CONFIGS = {
    "rtn": RTNConfig(group_size=32, use_mse_search=True),
    "hqq": HQQConfig(group_size=32),
    "gptq": GPTQConfig(group_size=32),
    "gptq nf4": GPTQConfig(dtype="nf4", group_size=32),
    "dynamic": DynamicQuantConfig(act_granularity="per_token", w_granularity="per_channel"),
    "static": StaticQuantConfig(act_algo="kl"),
    "smooth": SmoothQuantConfig(alpha="auto"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_results_are_the_same(name: str, program: str) -> None:
    """Quantize within it, and call the result within all of it but autocast, which is for what is called, too."""
    torch.manual_seed(0)
    data = [torch.randn(4, 10, 64) for _ in range(3)]
    graph = export(Everything().eval(), (data[0],))

    def calibrate(model: Any) -> None:
        with plain():
            for x in data:
                model(x)

    def result() -> Tensor:
        q = quantize(copy.deepcopy(graph), CONFIGS[name], None if name in ("rtn", "hqq") else calibrate)
        with torch.autocast("cpu", enabled=False):
            y: Tensor = q(data[0])
        return y

    want = result()
    with PROGRAMS[program]():
        got = result()
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("program", ["bfloat16", "device", "autocast"])
@pytest.mark.parametrize("rows", [1, 3, 40, 2000])
def test_layers_by_rows(rows: int, program: str) -> None:
    torch.manual_seed(0)
    q, x = quantize(nn.Sequential(nn.Linear(64, 32)).eval(), RTNConfig()), torch.randn(rows, 64)
    want = q(x)
    with PROGRAMS[program]():
        got = q(x)
    assert torch.equal(got.float(), want if program != "autocast" else want.bfloat16().float())


def test_gptq_layer_by_layer_within_autocast() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.randn(256, 64)
    with torch.autocast("cpu", torch.bfloat16):
        q = quantize(model, GPTQConfig(), lambda p: p(x), inplace=False)
    assert all(line.error < 0.2 for line in q.report.weights)


def test_the_defaults_are_back_after_an_error() -> None:
    with torch.device("meta"), default_dtype(torch.float16), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ZeroDivisionError), plain():
            assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
            assert not torch.is_autocast_enabled("cpu")
            raise ZeroDivisionError
        assert torch.get_default_dtype() == torch.float16 and torch.zeros(1).device.type == "meta"
        assert torch.is_autocast_enabled("cpu")
