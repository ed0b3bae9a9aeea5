"""A call that fails leaves the model as it was, and one that needs data says so before it begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from inc_graph.errors import ConfigError, LoweringError
from inc_graph.export import export
from inc_graph.graph import get_level
from inc_graph.quantization import GPTQConfig, RTNConfig, convert, module_scope, prepare, quantize
from tests.model_state import same, snapshot


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_convert_with_a_config_that_fails_leaves_the_float_model(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = module_scope.finish, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise LoweringError("no memory left")
        return real(*args, **kwargs)

    monkeypatch.setattr(module_scope, "finish", failing)
    model = made()
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(LoweringError, match="no memory left"):
        convert(model, RTNConfig(group_size=16), inplace=inplace)
    assert len(calls) == 2
    assert same(before, snapshot(model)) and [type(m) for m in model.modules()] == kinds
    assert not module_scope.is_prepared(model)
    assert len(convert(model, RTNConfig(group_size=16)).report.weights) == 2  # and it can be done once more


def test_a_graph_that_is_converted_with_a_config_stays_a_float_graph() -> None:
    graph = export(made(), (torch.randn(2, 32),))
    assert len(convert(graph, RTNConfig(group_size=16)).report.weights) == 2
    assert get_level(graph) == "float"


def test_a_local_setting_that_needs_data_is_asked_for_it_first() -> None:
    config = RTNConfig(group_size=16).set_local("0", GPTQConfig(group_size=16))
    for call in (lambda m: quantize(m, config), lambda m: convert(m, config)):
        model = made()
        with pytest.raises(ConfigError, match="needs calibration data"):
            call(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in made().modules()]


def test_a_config_that_leaves_all_but_what_needs_no_data_float_needs_none() -> None:
    config = GPTQConfig(dtype="fp32").set_local("0", RTNConfig(group_size=16))
    for model in (quantize(made(), config), convert(made(), config)):
        assert [line.name for line in model.report.weights] == ["0"]
    assert prepare(made(), config) is not None
