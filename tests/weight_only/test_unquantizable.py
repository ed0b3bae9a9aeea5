"""A setting that names a module without a weight to quantize: an error that names it; a pattern may match nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import ConfigError, UnusedRuleWarning
from inc_graph.quantization import GPTQConfig, HQQConfig, RTNConfig, prepare
from tests.model_state import same, snapshot


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.act, self.rnn = nn.LayerNorm(32), nn.ReLU(), nn.LSTM(32, 32, batch_first=True)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.rnn(self.act(self.norm(x)))[0])


X = torch.randn(2, 5, 32)
EXAMPLES: list[Any] = [None, (X,)]
both = pytest.mark.parametrize("example", EXAMPLES, ids=["layers", "graph"])


@both
@pytest.mark.parametrize(
    ("name", "config"),
    [("norm", RTNConfig()), ("act", GPTQConfig()), ("rnn", HQQConfig(group_size=16)), ("block.1", RTNConfig())],
)
def test_named_by_its_path(name: str, config: Any, example: Any) -> None:
    model = Net().eval()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=f"no weight that could be quantized(?s:.*)'{name}'"):
        prepare(model, RTNConfig().set_local(name, config), example_inputs=example)
    assert same(before, snapshot(model))


@both
def test_a_container_with_layers_and_what_stays_float(example: Any) -> None:
    config = RTNConfig().set_local("block", RTNConfig(bits=8)).set_local("norm", RTNConfig(dtype="fp32"))
    assert prepare(Net().eval(), config, example_inputs=example) is not None


@both
def test_a_pattern_that_matches_nothing_is_a_warning(example: Any) -> None:
    with pytest.warns(UnusedRuleWarning):
        prepare(Net().eval(), RTNConfig().set_local("nor.*", RTNConfig()), example_inputs=example)
