"""The user's configs: fields and defaults, bad values, local settings, and the recipe they become."""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import pytest
import torch
from torch import nn

from inc_graph.errors import ConfigError
from inc_graph.options import make_estimator
from inc_graph.quantization import INT8StaticQuantConfig, StaticQuantConfig, get_default_static_config
from inc_graph.recipe import Recipe
from inc_graph.spec import PerChannel, PerTensor, QSpec

UPSTREAM = {
    "w_dtype": "int8",
    "w_sym": True,
    "w_granularity": "per_channel",
    "w_algo": "minmax",
    "act_dtype": "uint8",
    "act_sym": False,
    "act_granularity": "per_tensor",
    "act_algo": "minmax",
    "excluded_precisions": [],
    "white_list": "*",
    "model_info": None,
}


def test_the_fields_and_defaults_users_know() -> None:
    parameters = inspect.signature(INT8StaticQuantConfig).parameters
    assert {n: parameters[n].default for n in UPSTREAM} == UPSTREAM
    config = StaticQuantConfig()
    assert {n: getattr(config, n) for n in UPSTREAM} == UPSTREAM
    assert type(config) is INT8StaticQuantConfig and config.name == "static_quant"
    assert config == INT8StaticQuantConfig() == get_default_static_config()
    positional = INT8StaticQuantConfig("int8", True, "per_tensor", "minmax", "int8", True)
    assert (positional.w_granularity, positional.act_dtype, positional.act_sym) == ("per_tensor", "int8", True)


def test_configs_are_values() -> None:
    a = StaticQuantConfig(act_algo="kl").set_local("head", StaticQuantConfig(w_dtype="fp32"))
    assert a == copy.deepcopy(a) != StaticQuantConfig(act_algo="kl") and a.global_config == StaticQuantConfig(
        act_algo="kl"
    )
    assert a.to_dict()["global"]["act_algo"] == "kl" and a.to_dict()["local"]["head"]["w_dtype"] == "fp32"
    assert a.local_config == {"head": StaticQuantConfig(w_dtype="fp32")}
    assert repr(a) == "INT8StaticQuantConfig(act_algo='kl').set_local('head', INT8StaticQuantConfig(w_dtype='fp32'))"
    assert "local" not in StaticQuantConfig().to_dict() and "reduce_range" not in StaticQuantConfig().to_dict()
    assert StaticQuantConfig(reduce_range=True).to_dict()["reduce_range"] is True
    one, two = StaticQuantConfig(), StaticQuantConfig()
    one.excluded_precisions.append("bf16")
    assert two.excluded_precisions == [] and StaticQuantConfig().excluded_precisions == []
    with pytest.raises(TypeError):
        hash(a)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w_dtyp": "int8"}, r"no field 'w_dtyp'\n  hint: did you mean 'w_dtype'\?"),
        ({"bits": 8}, r"no field 'bits'\n  hint: fields: w_dtype, "),
        ({"w_dtype": "int9"}, r"w_dtype must be one of .*'int8', .*'fp32', not 'int9'\n  hint: did you mean 'int"),
        ({"w_dtype": "int16"}, "w_dtype must be one of"),
        ({"w_dtype": "mxfp4"}, "w_dtype must be one of"),
        ({"act_dtype": "nf4"}, "act_dtype must be one of"),
        ({"w_dtype": torch.int8}, "w_dtype must be one of .*not torch.int8"),
        ({"act_dtype": "uint-8"}, "act_dtype must be .*\n  hint: did you mean 'uint8'"),
        ({"w_sym": 1}, "w_sym must be True or False, not 1"),
        ({"w_granularity": "per_chanel"}, "did you mean 'per_channel'"),
        ({"act_granularity": "per_channel"}, "act_granularity must be one of 'per_tensor'"),
        ({"act_algo": "minmx"}, "(?s)act_algo must be a range estimator .*did you mean 'minmax'"),
        ({"act_algo": "minmaxx"}, r"not 'minmaxx'\n  hint: did you mean 'minmax'\?"),
        ({"act_algo": "mse"}, "act_algo must be a range estimator of several batches .*not 'mse'"),
        ({"act_algo": "percentile{percent=200}"}, "act_algo must be a range estimator .*percent must be above 50"),
        ({"act_algo": "percentile{percentage=99}"}, "act_algo must be a range estimator .*no option 'percentage'"),
        ({"act_algo": "kl{"}, "act_algo must be a range estimator .*not an algorithm"),
        ({"act_algo": None}, "act_algo must be a range estimator"),
        ({"bias_correction": "yes"}, "bias_correction must be True or False"),
        ({"excluded_precisions": "bf16"}, "excluded_precisions must be a list of precisions"),
        ({"white_list": "Linear"}, r"white_list must be '\*' or a list"),
        ({"white_list": [3]}, "expected a module name, a module class, a function or a predicate, not 3"),
        ({"fp8_config": "E3M4"}, "FP8Config.fp8_config must be one of 'E4M3', 'E5M2', not 'E3M4'"),
    ],
)
def test_unknown_fields_and_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StaticQuantConfig(**values)


def test_a_refused_value_changes_nothing() -> None:
    config = StaticQuantConfig()
    with pytest.raises(ConfigError, match="w_dtype must be"):
        config.w_dtype = "int3000"
    with pytest.raises(ConfigError, match="did you mean 'act_algo'"):
        config.act_alg = "kl"
    with pytest.raises(ConfigError, match="takes at most"):
        StaticQuantConfig(*range(20))
    with pytest.raises(ConfigError, match="w_dtype given twice"):
        StaticQuantConfig("int8", w_dtype="int8")
    for bad in ("[", 3, ["fc", None]):
        with pytest.raises(ConfigError):
            config.set_local(bad, StaticQuantConfig())
    for bad in (None, {"w_dtype": "fp32"}, INT8StaticQuantConfig):
        with pytest.raises(ConfigError, match="set_local needs a config"):
            config.set_local("fc", bad)
    assert config == StaticQuantConfig()


def test_fields_become_formats() -> None:
    what = StaticQuantConfig(reduce_range=False).op_quant()
    assert what.activation == QSpec("uint8", "asymmetric", PerTensor())
    assert what.weight == QSpec("int8", "symmetric", PerChannel(0)) and what.bias_correction
    what = StaticQuantConfig(
        w_dtype="int4",
        w_sym=False,
        w_granularity="per_tensor",
        w_algo="mse",
        act_dtype="int8",
        act_sym=True,
        act_algo="kl",
    ).op_quant()
    assert (what.weight, what.activation) == (QSpec("int4", "asymmetric"), QSpec("int8", "symmetric"))
    assert (what.weight_algorithm, what.act_algorithm) == ("mse", "kl")
    what = StaticQuantConfig(reduce_range=True).op_quant()
    assert (what.weight.qtype, what.activation.qtype) == ("int7", "uint7")
    assert StaticQuantConfig(w_dtype="fp32").op_quant() is None
    assert StaticQuantConfig(act_dtype="fp32").op_quant().activation is None
    for name in ("minmax", "moving_average", "percentile{percent=99.9}", "histogram_mse", "kl"):
        assert make_estimator(StaticQuantConfig(act_algo=name).act_algo).name == name.partition("{")[0]


def test_local_settings_become_rules() -> None:
    no, kl = StaticQuantConfig(w_dtype="fp32"), StaticQuantConfig(act_algo="kl")
    config = StaticQuantConfig().set_local("fc1", no).set_local([nn.Conv2d, torch.matmul], kl).set_local("fc1", kl)
    recipe = config.recipe("eager", None)
    assert [(r.where.kind, r.where.value, r.what and r.what.act_algorithm, r.origin) for r in recipe.rules] == [
        ("all", "", "minmax", ""),
        ("type", "torch.nn.modules.conv.Conv2d", "kl", "set_local(Conv2d)"),
        ("type", "torch._VariableFunctionsClass.matmul", "kl", "set_local(matmul)"),
        ("name", "fc1", "kl", "set_local('fc1')"),  # the last said
    ]
    assert Recipe.from_json(recipe.to_json()) == recipe
    only = StaticQuantConfig(white_list=["encoder", nn.Linear, operator.add])
    assert [(r.where.kind, r.what is not None, r.origin) for r in only.recipe("eager", None).rules] == [
        ("all", False, "white_list"),
        ("name", True, "white_list entry 'encoder'"),
        ("type", True, "white_list entry Linear"),
        ("type", True, "white_list entry add"),
    ]
    assert StaticQuantConfig(white_list=None).white_list == "*"


def test_a_config_set_in_itself_ends() -> None:
    config = StaticQuantConfig(w_dtype="fp32")
    config.set_local("body", config)
    assert config.local_config["body"] is not config and not config.local_config["body"].local_config
    assert config.local_config["body"].w_dtype == "fp32"
    with pytest.raises(ConfigError, match="has local settings of its own"):
        StaticQuantConfig().set_local("a", config)
    outer, inner = StaticQuantConfig(), StaticQuantConfig()
    outer.set_local("a", inner)
    with pytest.raises(ConfigError, match="set in itself"):
        inner.set_local("b", outer)
    assert set(config.local_config) == {"body"} and not inner.local_config


def test_a_setting_for_nothing_is_refused() -> None:
    config = StaticQuantConfig()
    for nothing in ([], (), set()):
        with pytest.raises(ConfigError, match="empty list"):
            config.set_local(nothing, StaticQuantConfig())
    assert not config.local_config
