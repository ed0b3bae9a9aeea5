"""Configs as `prepare` and `convert` take them: dictionaries, predicates, compositions, methods that are not there."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import ConfigError, IncWarning, UnknownNameError, UnusedRuleWarning
from inc_graph.export import export
from inc_graph.oppattern import OperatorInfo
from inc_graph.quantization import config as c
from inc_graph.quantization import convert, load, prepare, quantize
from inc_graph.quantization.decisions import decisions_of
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
    there = (c.INT8StaticQuantConfig, c.DynamicQuantConfig, c.SmoothQuantConfig, c.MixedPrecisionConfig)
    if kind in (*there, c.RTNConfig, c.HQQConfig, c.GPTQConfig):
        kind().recipe("eager", None)  # these are there
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


# ---------------------------------------------------------------------------------------------------------- precedence
KL = c.StaticQuantConfig(act_algo="kl")


def warned(config: Any) -> list[str]:
    """What is said of the rules when a graph is prepared; names that are prefixes are another matter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare(export(Net().eval(), (torch.randn(2, 3, 6, 6),)), config)
    texts = [str(w.message) for w in caught if issubclass(w.category, IncWarning)]
    return [t for t in texts if "also takes" not in t]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_regular_expression_is_no_whole_path(scope: str) -> None:
    """Among regular expressions the last said counts, however much of a path they cover; a whole path is above them."""
    static = c.StaticQuantConfig
    assert int8(static().set_local(".*", KL).set_local("fc", FLOAT), scope) == {"conv"}
    assert int8(static().set_local("fc1", FLOAT).set_local("fc.*", KL), scope) == {"conv", "fc2", "fc10"}
    with pytest.warns(UnusedRuleWarning, match=r"set_local\('fc'\) never counts|matched no"):
        assert int8(static().set_local("fc", FLOAT).set_local(".*", KL).set_local("no", KL), scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_local_settings_are_above_the_white_list(scope: str) -> None:
    for key in (nn.Linear, is_wide, "fc", "Linear"):
        config = c.StaticQuantConfig(white_list=["conv", "fc1$", "fc2"]).set_local(key, FLOAT)
        assert int8(config, scope) == {"conv"}
    config = c.StaticQuantConfig(white_list=["fc1$"]).set_local("conv", KL)  # also for what the list leaves out
    assert int8(config, scope) == {"conv", "fc1"}


def test_rules_that_never_count_are_said_with_what_beats_them() -> None:
    config = c.StaticQuantConfig().set_local("fc1", FLOAT).set_local("fc(2|10)$", KL)
    assert warned(config) == []  # each counts somewhere
    config = c.StaticQuantConfig().set_local("fc2", FLOAT).set_local("fc2$", KL)
    assert warned(config) == ["set_local('fc2$') never counts: set_local('fc2') beats it"]
    config = c.StaticQuantConfig().set_local(nn.Conv2d, KL).set_local("con", FLOAT).set_local("c", FLOAT)
    assert warned(config) == ["set_local(Conv2d) never counts: set_local('c') beats it"]  # 'con' loses to the same
    assert warned(c.StaticQuantConfig(white_list=["fc1", "fc2"]).set_local("fc", KL)) == []


def test_a_layer_that_two_configs_claim_is_said_once() -> None:
    def static(names: Any = "*", bits: str = "int8") -> Any:
        return c.StaticQuantConfig(white_list=names, w_dtype=bits)

    first, second = "white_list entry 'fc2' of config 1", "white_list entry 'fc2' of config 2"
    assert warned(static(["fc2"]) + static(["fc2"], "int4")) == [f"two configs claim fc2: {second} wins over {first}"]
    (text,) = warned(static(["fc"]) + static(["fc2"], "int4"))
    assert text == f"two configs claim fc2: {second} wins over white_list entry 'fc' of config 1"
    (text,) = warned(static(["fc"]).set_local("fc2", FLOAT) + static(["conv", "fc2"], "int4"))
    assert text == f"two configs claim fc2: {second} wins over set_local('fc2') of config 1"
    (text,) = warned(static() + static("*", "int4"))
    assert text.startswith("two configs claim conv, ")
    assert text.endswith("everything of config 2 wins over everything of config 1")
    assert warned(static(["fc2"], "int4") + static()) == []  # the rest goes to the second
    assert warned(static(["fc2"]) + static(["fc2"])) == []  # both say the same

    class Urgent(c.INT8StaticQuantConfig):
        priority = 1

    (text,) = warned(static(["fc2"], "int4") + Urgent())
    assert text == f"two configs claim fc2: everything of config 2 wins over {first}"


# ------------------------------------------------------------------------------------------------------ derived classes
class Sub(nn.Linear):
    pass


def is_a(operator: OperatorInfo) -> bool:
    return operator.name == "a"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("where", ["module", "function"])
def test_layers_of_a_derived_class(scope: str, where: str) -> None:
    class Hidden(nn.Linear):
        pass

    kind = Sub if where == "module" else Hidden

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = kind(4, 4), kind(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    x = torch.randn(2, 4)

    def done(config: Any) -> set[str]:
        model = Two().eval()
        prepared = prepare(export(model, (x,)) if scope == "graph" else model, config, True,
                           (x,) if scope == "eager" else None)  # fmt: skip
        prepared(x)
        return {line.module for line in convert(prepared).report.quantized}

    assert done(c.StaticQuantConfig().set_local(is_a, FLOAT)) == {"b", "c"}
    assert done(c.StaticQuantConfig(white_list=[is_a])) == {"a"}
    assert done(c.StaticQuantConfig().set_local(kind, FLOAT)) == {"c"}
    assert done(c.StaticQuantConfig(white_list=[kind.__name__])) == {"a", "b"}
    with pytest.raises(ConfigError, match="nothing in this model can be quantized"):
        done(c.StaticQuantConfig().set_local(nn.Linear, FLOAT))


# --------------------------------------------------------------------------------------------------------- as a table
def test_which_rule_gave_which_operator_which_method(tmp_path: Any) -> None:
    x = torch.randn(2, 3, 6, 6)
    config = c.StaticQuantConfig().set_local("fc2", FLOAT).set_local(nn.Conv2d, KL)
    prepared = prepare(export(Net().eval(), (x,)), config)
    before = decisions_of(prepared)
    prepared(x)
    q_model = convert(prepared)
    q_model.save(tmp_path / "model")
    for found in (before, q_model.recipe, q_model.report.recipe, load(tmp_path / "model").recipe):
        said = {line.module: (line.op, line.rule, line.origin, line.method) for line in found.lines if line.module}
        assert said["conv"][:3] == ("conv2d", 2, "set_local(Conv2d)")
        assert "uint8 asymmetric per_tensor (kl), weight int8" in said["conv"][3]
        assert said["fc2"] == ("linear", 1, "set_local('fc2')", "float: kept float by set_local('fc2')")
        assert said["fc1"][1:3] == (0, "static_quant, everything")
        assert "set_local(Conv2d)" in str(found) and str(found).startswith("static_quant for ")
    with pytest.raises(ConfigError, match="carries no recipe"):
        decisions_of(Net())


def test_the_recipe_layer_by_layer() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = prepare(Net().eval(), c.StaticQuantConfig().set_local("fc1$", KL))
    model(x)
    for m in (model, convert(model)):
        assert [(d.module, d.rule) for d in decisions_of(m).lines] == [("conv", 0), ("fc1", 1), ("fc2", 0), ("fc10", 0)]


def test_a_predicate_that_forgets_operators_without_a_weight_is_told() -> None:
    def is_tall(operator: OperatorInfo) -> bool:
        return operator.weight_shape[0] > 1000  # type: ignore[index]

    with pytest.raises(ConfigError, match=r"hint: .*weight_shape is None of an operator without a weight"):
        quantized(c.StaticQuantConfig().set_local(is_tall, FLOAT), "graph")


# -------------------------------------------------------------------------------------------------------------- keys
def test_an_operator_of_torch_with_and_without_overload() -> None:
    for key in (torch.ops.aten.linear, torch.ops.aten.linear.default, nn.functional.linear):
        config = c.StaticQuantConfig().set_local(key, FLOAT)
        assert int8(config, "graph") == {"conv"}
        assert c.INT8StaticQuantConfig.from_dict(config.to_dict()) == config


def test_keys_that_mean_nothing_are_refused() -> None:
    for key in (nn.Linear(2, 2), Net()):
        with pytest.raises(ConfigError, match=r"module object.*\n  hint: give the name it has in the model"):
            c.StaticQuantConfig().set_local(key, FLOAT)
        with pytest.raises(ConfigError, match="module object"):
            c.StaticQuantConfig(white_list=[key])
    with pytest.warns(UnusedRuleWarning, match="no operator .* by its name; the type matmul is meant by its class or"):
        quantized(c.StaticQuantConfig().set_local("matmul", FLOAT), "graph")


# --------------------------------------------------------------------------------------------------------------- docs
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "configs.md").read_text(encoding="utf-8")


def test_the_keys_of_the_documentation_work() -> None:
    """Each example of the table is a key, and the predicates can be asked about every operator."""
    rows = re.findall(r"^\| (.*) \| (`.*`) \|$", PAGE, re.MULTILINE)
    found = [text for _, cell in rows for text in re.findall(r"`([^`]*)`", cell) if not text.startswith(("St", "RTN"))]
    assert len(found) >= 8 and any(text.startswith("lambda") for text in found)
    for text in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = c.StaticQuantConfig().set_local(eval(text, {"nn": nn, "torch": torch}), KL)
            assert "fc2" in int8(config, "graph"), text


def test_the_documented_priorities() -> None:
    kinds = c.get_all_registered_configs()
    said = {name.lower(): int(number) for name, number in re.findall(r"\b([A-Za-z]+) (\d+),", PAGE)}
    assert said["gptq"] == 90 and all(kinds[name].priority == number for name, number in said.items() if name in kinds)
    assert all(kind.priority == said.get(name, 0) for name, kind in kinds.items())
