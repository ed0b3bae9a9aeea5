"""What options of weight-only configs cannot be together is refused by prepare, and what does nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from inc_graph.errors import ConfigError, IncWarning
from inc_graph.quantization import GPTQConfig, HQQConfig, RTNConfig, prepare


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64)).eval()


@pytest.mark.parametrize("scope", ["graph", "layers"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPTQConfig(fp8_aware=True, bits=8), "GPTQConfig.fp8_aware needs integers of at most 4 bits, not int8"),
        (GPTQConfig(fp8_aware=True, dtype="nf4"), "GPTQConfig.fp8_aware needs integers of at most 4 bits, not nf4"),
        (GPTQConfig(act_order=True, hybrid_order=True), "GPTQConfig: act_order and hybrid_order exclude each other"),
        (HQQConfig(dtype="nf4"), "HQQConfig.dtype 'nf4' has no zero points"),
    ],
)
def test_before_any_data_is_run(config: Any, words: str, scope: str) -> None:
    example = {"example_inputs": (torch.zeros(2, 64),)} if scope == "graph" else {}
    with pytest.raises(ConfigError, match=words):
        prepare(model(), config, **example)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RTNConfig(double_quant_bits=4), "RTNConfig.double_quant_bits=4: use_double_quant=False"),
        (GPTQConfig(double_quant_group_size=16), "GPTQConfig.double_quant_group_size=16: use_double_quant=False"),
        (
            RTNConfig(use_double_quant=True, double_quant_dtype="int4", double_quant_bits=6),
            "RTNConfig.double_quant_bits=6: double_quant_dtype 'int4' has 4",
        ),
        (
            HQQConfig(quant_zero=False, scale_quant_group_size=16),
            "HQQConfig.scale_quant_group_size=16: neither quant_zero nor quant_scale",
        ),
    ],
)
def test_fields_without_effect(config: Any, words: str) -> None:
    with pytest.warns(IncWarning, match=words):
        prepare(model(), config)
