"""Configs in the corners: lists of candidates in local settings and compositions, values that files cannot hold as
they are, dictionaries that say nothing sensible, and members that classes written for neural_compressor use.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import ConfigError, IncWarning
from inc_graph.export import export
from inc_graph.quantization import config as c
from inc_graph.quantization import convert, prepare
from inc_graph.quantization.composable import as_config
from inc_graph.quantization.tuning_config import ConfigSet, TuningConfig

S = c.INT8StaticQuantConfig
FLOAT = S(w_dtype="fp32")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


# ---------------------------------------------------------------------------------------------------------- candidates
def test_candidates_of_local_settings_are_expanded() -> None:
    config = S(act_sym=[True, False]).set_local("fc1$", S(act_algo=["kl", "minmax"])).set_local("fc2$", FLOAT)
    before = copy.deepcopy(config)
    found = config.expand()
    assert config == before and not any(new.is_set() for new in found)
    got = [(new.act_sym, new.local_config["fc1$"].act_algo) for new in found]
    assert got == list(itertools.product([True, False], ["kl", "minmax"]))
    assert all(list(new.local_config) == ["fc1$", "fc2$"] and new.local_config["fc2$"] == FLOAT for new in found)
    found[0].local_config["fc1$"].act_algo = "percentile"
    assert found[2].local_config["fc1$"].act_algo == "kl" and config == before
    assert len(ConfigSet([config, found[1]])) == 4
    new = TuningConfig([config]).config_set[1]
    assert prepare(export(Net().eval(), (torch.ones(1, 8),)), new) is not None


def test_a_config_of_several_operators_is_one_choice() -> None:
    both = S(act_algo=["kl", "minmax"])
    found = S().set_local(["fc1$", "fc2$"], both).expand()
    assert [[i.act_algo for i in new.local_config.values()] for new in found] == [["kl", "kl"], ["minmax", "minmax"]]
    assert len(S().set_local("fc1$", both).set_local("fc2$", copy.copy(both)).expand()) == 4


def test_a_composition_is_tried_as_one_config() -> None:
    one, two = S(white_list=["fc1$"], act_algo=["kl", "minmax"]), c.RTNConfig(white_list=["fc2$"], bits=[4, 8])
    found = (one + two).expand()
    assert [[p.act_algo if type(p) is S else p.bits for p in new.config_list] for new in found] == [
        ["kl", 4], ["kl", 8], ["minmax", 4], ["minmax", 8],
    ]  # fmt: skip
    assert all(type(new) is c.ComposableConfig and not new.is_set() for new in found)
    assert all(new.config_list[0].white_list == ["fc1$"] for new in found)
    plain = S(white_list=["fc1$"]) + S(w_dtype="int4", white_list=["fc2$"])
    assert plain.expand() == [plain] and list(ConfigSet([plain, plain])) == [plain]
    assert plain.expand()[0].config_list[0] is not plain.config_list[0]
    assert c.ComposableConfig([]).expand() == []


# -------------------------------------------------------------------------------------------------------- compositions
def test_what_a_composition_is_made_of() -> None:
    assert c.ComposableConfig(x for x in [S(), c.RTNConfig()]) == S() + c.RTNConfig()
    for bad in (None, 3, "rtn", [None], S(), {"rtn": {}}):
        with pytest.raises(ConfigError, match="ComposableConfig needs a list of configs"):
            c.ComposableConfig(bad)  # type: ignore[arg-type]
    both = S() + S(w_dtype="int4")
    with pytest.raises(ConfigError, match=r"(?s)white_list of a composition.*one of the configs"):
        both.white_list = ["a$"]
    both.white_list = None
    assert both.white_list == "*"


def test_a_composition_cannot_be_a_local_setting() -> None:
    config = S()
    for other in (S() + S(w_dtype="int4"), config + S(), c.ComposableConfig([S()])):
        with pytest.raises(ConfigError, match=r"(?s)set_local takes one config, not a composition.*white_list"):
            config.set_local("fc1", other)
    assert not config.local_config
    outer = c.ComposableConfig([S().set_local("fc1", config)])
    assert outer.reaches(config) and outer.reaches(outer) and not outer.reaches(S())


@pytest.mark.parametrize("where", ["alone", "in a sum", "of a float config in a sum"])
def test_local_settings_of_local_settings_are_refused(where: str) -> None:
    """They would say nothing. They may be set after the config was given to another one, so `prepare` looks, too."""
    inner = S()
    config = (S(w_dtype="fp32", white_list=["fc2$"]) if "float" in where else S()).set_local("fc", inner)
    whole = config if where == "alone" else config + S(w_dtype="int4", white_list=["fc2$"])
    program = export(Net().eval(), (torch.ones(1, 8),))
    prepare(program, whole, inplace=False)
    inner.set_local("fc1$", FLOAT)
    with pytest.raises(ConfigError, match=r"(?s)the config in set_local\('fc'\) has local settings of its own.*outer"):
        prepare(program, whole, inplace=False)
    with pytest.raises(ConfigError, match=r"has local settings of its own"):
        prepare(Net().eval(), whole)
    with pytest.raises(ConfigError, match=r"the config in set_local\('fc'\) has a white list of its own"):
        config.set_local("fc", S(w_dtype="fp32", white_list=["fc1$"]))
    itself = S(white_list=["fc2$"])
    assert prepare(program, itself.set_local("fc1$", itself), inplace=False) is not None  # its fields


@pytest.mark.parametrize(
    "leaves",
    [
        c.MixedPrecisionConfig(dtype="fp32"), c.DynamicQuantConfig(w_dtype="fp32"), c.AWQConfig(dtype="fp32"),
    ],
    ids=lambda config: config.name,
)  # fmt: skip
def test_float_is_float_in_every_method(leaves: Any) -> None:
    """Of a method that is not there yet, too."""
    x = torch.randn(4, 8)

    def floats(config: Any) -> set[str]:
        prepared = prepare(export(Net().eval(), (x,)), config)
        prepared(x)
        return {line.module for line in convert(prepared).report.floats}

    assert "fc1" in floats(S().set_local("fc1$", leaves)) and "fc2" not in floats(S().set_local("fc1$", leaves))
    part = copy.copy(leaves)
    part.white_list = ["fc1$"]
    floats(S() + part)
    other = S() + part.set_local("fc2$", type(leaves)())  # this one says to quantize fc2
    if type(leaves) is c.DynamicQuantConfig:
        assert "fc2" not in floats(other)
        return
    if leaves.name == "mixed_precision":
        return  # a method that is there
    with pytest.raises(NotImplementedError, match="does not have the algorithm"):
        floats(other)


# ---------------------------------------------------------------------------------------------------- StaticQuantConfig
def test_static_is_a_class(tmp_path: Path) -> None:
    int8, fp8 = c.StaticQuantConfig(w_sym=False), c.StaticQuantConfig(fp8_config="E5M2")
    assert type(int8) is S and type(fp8) is c.FP8Config
    assert isinstance(int8, c.StaticQuantConfig) and isinstance(fp8, c.StaticQuantConfig)
    assert not isinstance(c.RTNConfig(), c.StaticQuantConfig) and not isinstance(int8, c.FP8Config)
    assert c.StaticQuantConfig.get_config_set_for_tuning() == S.get_config_set_for_tuning()
    assert len(c.StaticQuantConfig.get_config_set_for_tuning().expand()) == 4
    assert len(c.FP8Config.get_config_set_for_tuning().expand()) == 1
    assert c.StaticQuantConfig.name == "base_config"
    assert c.StaticQuantConfig.get_model_info(Net()) == [("fc1", "Linear"), ("fc2", "Linear")]
    for config in (int8.set_local("fc1$", FLOAT), fp8):
        assert c.StaticQuantConfig.from_dict(config.to_dict()) == config
        config.to_json_file(tmp_path / "c.json")
        back = c.StaticQuantConfig.from_json_file(tmp_path / "c.json")
        assert back == config and type(back) is type(config)
        assert pickle.loads(pickle.dumps(config)) == copy.copy(config) == copy.deepcopy(config) == config
    assert back.json_file == str(tmp_path / "c.json")
    c.StaticQuantConfig.validate(int8)
    with pytest.raises(ConfigError, match="INT8StaticQuantConfig has no field 'use_qdq'"):
        c.StaticQuantConfig(use_qdq=True)


# ---------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize(
    "config",
    [
        c.AutoRoundConfig(options=["MXFP4"]),
        c.AutoRoundConfig(to_quant_block_names=("a", "b")),
        c.AutoRoundConfig(shared_layers=[("a", "b")]),
        c.AutoRoundConfig(device_map={0: "cpu"}),
        c.FP8Config(allowlist={"names": [], "types": ("Linear",)}),
        c.FP8Config(blocklist={"names": ("head",), "types": ["x"]}),
        c.FP8Config(blocklist={"names": ["head"]}),
        S(excluded_precisions=("bf16",)),
        S(model_info=[("fc1", "Linear")]),
        S(model_info=[("fc1", nn.Linear)]),
        c.AWQConfig(absorb_layer_dict={"a": ("b",)}),
        c.SmoothQuantConfig(excluded_precisions=[["bf16"], ("fp16",)]),
    ],
    ids=repr,
)
def test_what_is_kept_is_what_files_give_back(config: Any) -> None:
    for back in (type(config).from_dict(config.to_dict()), type(config).from_json_string(config.to_json_string())):
        assert back == config and back.get_params_dict() == config.get_params_dict()
    assert type(config).from_json_string(config.to_json_string(use_diff=True)) == config


def test_sequences_are_kept_as_the_default_is() -> None:
    assert c.AutoRoundConfig(options=["A"]).options == ("A",)
    assert c.FP8Config(blocklist={"names": (), "types": ["x"]}).blocklist == {"names": [], "types": ("x",)}
    assert S(model_info=[("a", nn.Linear)]).model_info == [["a", "Linear"]]


def test_differences_alone_are_enough() -> None:
    config = S(act_algo="kl", white_list=["a", nn.Linear]).set_local("fc1", c.RTNConfig(bits=3)).set_local("b", S())
    text = config.to_json_string(use_diff=True)
    assert S.from_json_string(text) == config and len(text) < len(config.to_json_string()) / 2
    assert json.loads(S(act_algo="kl").to_json_string(use_diff=True)) == {"act_algo": "kl"}
    both = config + c.GPTQConfig(bits=8)
    assert c.ComposableConfig.from_json_string(both.to_json_string(use_diff=True)) == both


def test_a_value_that_no_file_holds_is_said() -> None:
    config = c.AutoRoundConfig(processor=object())
    with pytest.warns(IncWarning, match=r"AutoRoundConfig.processor is left out: a file cannot hold it"):
        config.to_json_string()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert c.AutoRoundConfig().to_json_string()


def test_arrays_are_lists_of_numbers() -> None:
    config = c.SmoothQuantConfig(alpha=np.array([0.25, 0.5]))
    assert config.alpha == [0.25, 0.5] and [type(x.alpha) for x in config.expand()] == [float, float]
    assert c.SmoothQuantConfig(alpha=torch.tensor([0.25, 0.5])) == config
    assert c.SmoothQuantConfig(alpha=[np.float32(0.25), np.float64(0.5)]) == config
    assert type(c.RTNConfig(bits=np.int64(3)).bits) is int and c.RTNConfig(bits=np.arange(2, 5)).bits == [2, 3, 4]
    for bad in (np.array([0.25, 7.0]), np.float64("nan"), np.array([[0.5]])):
        with pytest.raises(ConfigError, match="alpha must be a number from 0 to 1"):
            c.SmoothQuantConfig(alpha=bad)


# ------------------------------------------------------------------------------------------------------- what is shared
def test_no_list_is_shared() -> None:
    mine = ["bf16"]
    config = S(white_list=["fc1$"])
    config.excluded_precisions = mine
    mine.append("fp16")
    assert config.excluded_precisions == ["bf16"]
    for other in (config.global_config, config.expand()[0], copy.copy(config)):
        other.excluded_precisions.append("fp16")
    config.expand()[0].white_list.append("fc2$")
    copy.copy(config).white_list.append("fc2$")
    config.get_params_dict()["excluded_precisions"].append("fp16")
    config.to_dict()["excluded_precisions"].append("fp16")
    assert config == S(white_list=["fc1$"], excluded_precisions=["bf16"])
    lists = {"names": ["a"], "types": ["Linear"]}
    fp8 = c.FP8Config(allowlist=lists)
    lists["names"].append("b")
    assert fp8.allowlist["names"] == ["a"]
    assert config.global_config == S(excluded_precisions=["bf16"])  # neither local settings nor white list
    inner = S()
    assert copy.copy(S().set_local("a", inner)).local_config["a"] is inner


def test_the_options_of_smoothquants_search_agree() -> None:
    found = c.SmoothQuantConfig(init_alpha=[0.3, 0.6]).expand()
    assert [x.auto_alpha_args["init_alpha"] for x in found] == [0.3, 0.6] == [x.init_alpha for x in found]
    config = c.SmoothQuantConfig()
    config.init_alpha, config.alpha_max = 0.9, 0.95
    assert (config.auto_alpha_args["init_alpha"], config.auto_alpha_args["alpha_max"]) == (0.9, 0.95)
    back = c.SmoothQuantConfig.from_dict(config.to_dict())
    assert back == config
    back.init_alpha = 0.2
    assert back.auto_alpha_args["init_alpha"] == 0.2 and config.auto_alpha_args["init_alpha"] == 0.9
    own = c.SmoothQuantConfig(auto_alpha_args={"init_alpha": 0.7})
    own.init_alpha = 0.1
    assert own.auto_alpha_args == {"init_alpha": 0.7}  # the user's word
    wide = c.SmoothQuantConfig(alpha_min=[0.0, 0.1], alpha_max=[0.5, 1.0])
    assert [(x.alpha_min, x.alpha_max) for x in wide.expand()] == [(0.0, 0.5), (0.0, 1.0), (0.1, 0.5), (0.1, 1.0)]
    with pytest.raises(ConfigError, match=r"alpha_min 0.6 is above alpha_max 0.5"):
        c.SmoothQuantConfig(alpha_min=[0.0, 0.6], alpha_max=[0.5, 1.0])


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"static_quant": {"local": ["fc1"]}}, r"'local' must give a config for each name, not \['fc1'\]"),
        ({"static_quant": {"local": "fc1"}}, "'local' must give a config for each name, not 'fc1'"),
        ({"static_quant": {"local": {1: {}}}}, r"'local' must give a config for each name, not \{1: "),
        ({"static_quant": {"local": {"fc1": {2: 3}}}}, "fields have names, not 2"),
        ({"static_quant": {1: 2}}, "INT8StaticQuantConfig: fields have names, not 1"),
        ({"static_quant": {"local": {"fc1": None}}}, "is read from a dictionary, not from None"),
    ],
)
def test_dictionaries_that_say_nothing(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_config(data)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "c.json", tmp_path, tmp_path / ("x" * 300), "/"):
        with pytest.raises(ConfigError, match=r"cannot be written: "):
            S().to_json_file(path)
    assert not list(tmp_path.iterdir())
    deep = '{"local": {"a": ' * 5000 + "{}" + "}}" * 5000
    with pytest.raises(ConfigError, match="nested too deeply"):
        S.from_json_string(deep)
    (tmp_path / "deep").write_text("[" * 100000)
    with pytest.raises(ConfigError, match="deep: INT8StaticQuantConfig: "):
        S.from_json_file(tmp_path / "deep")


def test_values_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match=r"excluded_precisions must be a list of precisions: 'bf16', 'fp16', not"):
        S(excluded_precisions=["banana"])
    with pytest.raises(ConfigError, match="white_list must be"):
        S(white_list={"fc1": 1})
    # a format with a width of its own counts, as in neural_compressor, whose tuning sets rely on it
    assert c.RTNConfig(dtype="int8").to_dict()["bits"] == 4 and c.RTNConfig(dtype="int4", bits=8).dtype == "int4"


# ------------------------------------------------------------------------------------ written for neural_compressor
def test_members_of_the_base_class() -> None:
    config = c.RTNConfig().set_local("fc1", FLOAT).set_local([nn.Linear, torch.matmul], c.RTNConfig(bits=8))
    assert config._is_initialized is True and c.RTNConfig._is_initialized is False
    assert config._is_op_type(nn.Linear) and config._is_op_type(torch.matmul) and not config._is_op_type("Linear")
    assert (config._op_type_to_str(nn.Linear), config._op_type_to_str(torch.matmul)) == ("Linear", "matmul")
    types, names = config._get_op_name_op_type_config()
    assert list(types) == ["Linear", "matmul"] and types["Linear"].bits == 8 and names == {"fc1": FLOAT}
    assert not hasattr(S, "get_model_info_for_ipex")
