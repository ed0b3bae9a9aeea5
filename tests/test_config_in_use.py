"""Configs as `prepare` and `convert` take them: dictionaries, predicates, compositions, methods that are not there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import ConfigError, UnknownNameError, UnusedRuleWarning
from inc_graph.export import export
from inc_graph.oppattern import OperatorInfo
from inc_graph.quantization import config as c
from inc_graph.quantization import convert, prepare, quantize
from inc_graph.recipe import get_recipe

FLOAT = c.StaticQuantConfig(w_dtype="fp32")
SCOPES = ("graph", "eager", "layers")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc1, self.fc2, self.fc10 = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.fc10(self.fc2(self.fc1(x).relu()).relu())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UnusedRuleWarning)
        yield


def quantized(config: Any, scope: str) -> Any:
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    if scope == "graph":
        prepared = prepare(export(model, (x,)), config)
    else:
        prepared = prepare(model, config, example_inputs=(x,) if scope == "eager" else None)
    prepared(x)
    return convert(prepared)


def int8(config: Any, scope: str) -> set[str]:
    return {line.module for line in quantized(config, scope).report.kernels} - {""}


def is_wide(operator: OperatorInfo) -> bool:
    return operator.op == "linear" and operator.weight_shape is not None and operator.weight_shape[0] == 8


@pytest.mark.parametrize("scope", SCOPES)
def test_predicates(scope: str) -> None:
    """Asked about each operator with its name, type and weight; more specific than a class, less than a name."""
    assert int8(c.StaticQuantConfig().set_local(is_wide, FLOAT), scope) == {"conv", "fc10"}
    assert int8(c.StaticQuantConfig(white_list=[is_wide]), scope) == {"fc1", "fc2"}
    config = c.StaticQuantConfig().set_local("fc1$", c.StaticQuantConfig()).set_local(is_wide, FLOAT)
    assert int8(config.set_local(nn.Linear, c.StaticQuantConfig()), scope) == {"conv", "fc1", "fc10"}


def test_functions_without_a_module_are_predicates() -> None:
    names: dict[str, Any] = {}
    exec("def all_of_them(operator): return True", names)
    assert names["all_of_them"].__module__ is None
    assert c.StaticQuantConfig().set_local(names["all_of_them"], FLOAT).predicates()
    assert not c.StaticQuantConfig().set_local(torch.matmul, FLOAT).predicates()


def test_the_recipe_says_what_a_predicate_took() -> None:
    x = torch.randn(2, 3, 6, 6)
    prepared = prepare(export(Net().eval(), (x,)), c.StaticQuantConfig().set_local(is_wide, FLOAT))
    (rule,) = [r for r in get_recipe(prepared).rules if r.where.kind == "predicate"]
    assert rule.where.members == ("fc1", "fc2") and rule.origin == "set_local(is_wide)"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_predicate_that_takes_nothing_or_fails_is_said(scope: str) -> None:
    with pytest.warns(UnusedRuleWarning, match="never"):
        quantized(c.StaticQuantConfig().set_local(never, FLOAT), scope)
    with pytest.raises(ConfigError, match=r"predicate broken fails for OperatorInfo\(name='conv'.*ZeroDivisionError"):
        quantized(c.StaticQuantConfig().set_local(broken, FLOAT), scope)


def never(operator: OperatorInfo) -> bool:
    return False


def broken(operator: OperatorInfo) -> bool:
    return bool(1 // 0)


@pytest.mark.parametrize("scope", SCOPES)
def test_dictionaries(scope: str) -> None:
    data = {"static_quant": {"global": {"act_algo": "kl"}, "local": {"fc1$": {"w_dtype": "fp32"}}}}
    before = copy.deepcopy(data)
    assert int8(data, scope) == {"conv", "fc2", "fc10"} and data == before
    assert int8({"static_quant": {}}, scope) == {"conv", "fc1", "fc2", "fc10"}
    with pytest.raises(UnknownNameError, match="'static_quan'; did you mean 'static_quant'"):
        quantized({"static_quan": {}}, scope)
    with pytest.raises(ConfigError, match="no field 'act_alg'"):
        quantized({"static_quant": {"act_alg": "kl"}}, scope)
    with pytest.raises(ConfigError, match="an empty composition"):
        quantized({}, scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_compositions_of_one_method(scope: str) -> None:
    """Each config quantizes what its white list names; one that speaks of everything takes the rest."""
    only = c.StaticQuantConfig(white_list=["conv"]) + c.StaticQuantConfig(white_list=["fc1$"])
    assert int8(only, scope) == {"conv", "fc1"}
    rest = c.StaticQuantConfig(act_algo="kl", white_list=["conv"]) + c.StaticQuantConfig().set_local("fc2", FLOAT)
    assert int8(rest, scope) == {"conv", "fc1", "fc10"}
    assert rest.config_list[0].white_list == ["conv"]


@pytest.mark.parametrize("kind", c.get_all_registered_configs().values(), ids=lambda k: k.__name__)
def test_methods_that_are_not_there_are_said(kind: Any) -> None:
    if kind is c.INT8StaticQuantConfig:
        return
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    state = copy.deepcopy(model.state_dict())
    for config in (kind(), {kind.name: {}}, kind() + c.StaticQuantConfig()):
        for call in (
            lambda config=config: prepare(model, config, example_inputs=(x,)),
            lambda config=config: prepare(model, config),
            lambda config=config: quantize(model, config, run_fn=lambda m: m(x)),
        ):
            with pytest.raises(NotImplementedError, match=f"does not have the algorithm '{kind.name}'"):
                call()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_set_of_candidates_is_no_config() -> None:
    with pytest.raises(ConfigError, match="holds lists of candidates\n  hint: try them with autotune"):
        prepare(Net().eval(), c.StaticQuantConfig(act_algo=["kl", "minmax"]))
