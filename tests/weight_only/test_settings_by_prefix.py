"""A setting by a part of names serves those that can take it; serving nobody, or naming one layer, it is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import ConfigError
from inc_graph.quantization import GPTQConfig, RTNConfig, prepare, quantize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed": nn.Embedding(50, 32), "fc": nn.Linear(32, 32)})
        self.head = nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.model["fc"](self.model["embed"](ids)))
        return y


IDS = torch.arange(50).reshape(5, 10)


def scope(exported: bool) -> dict[str, Any]:
    return {"example_inputs": (IDS,)} if exported else {}


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("key", ["model", "model.", ".*"])
def test_who_cannot_take_it_stays_float(key: str, exported: bool) -> None:
    torch.manual_seed(0)
    config = GPTQConfig(bits=8).set_local(key, GPTQConfig(bits=4))
    q = quantize(Net().eval(), config, lambda m: m(IDS), **scope(exported))
    forms = {line.name: line.form[:4] for line in q.report.weights}
    assert forms == {"model.fc": "int4", "head": "int4" if key == ".*" else "int8"}
    assert any("gptq rounds against the inputs" in line.detail for line in q.report.floats)


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("key", ["model.embed", "model.embed$", ".*embed"])
def test_a_setting_that_serves_nobody_is_an_error(key: str, exported: bool) -> None:
    model = Net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"cannot be quantized: gptq rounds .*\[.*'model.embed'\]"):
        prepare(model, GPTQConfig().set_local(key, GPTQConfig()), **scope(exported))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_parts_of_a_layer_that_reads_weights_itself() -> None:
    block = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, dropout=0)).eval()
    q = quantize(block, RTNConfig().set_local("0", RTNConfig(bits=8)))
    assert {line.form[:4] for line in q.report.weights} == {"int8"}
    with pytest.raises(ConfigError, match="MultiheadAttention reads its weight"):
        prepare(
            nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64)).eval(),
            RTNConfig().set_local("0.self_attn", RTNConfig(bits=8)),
        )
