"""Random configs with random local settings: files give them back, and each module gets what a plain search says."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from inc_graph.errors import ConfigError
from inc_graph.oppattern import OperatorInfo
from inc_graph.quantization import config as c
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.fields import Field
from inc_graph.quantization.mapping import config_mapping

CLASSES = list(c.get_all_registered_configs().values())


def is_first(operator: OperatorInfo) -> bool:
    return operator.name.endswith("1")


def has_no_digit(operator: OperatorInfo) -> bool:
    return not re.search(r"\d", operator.name)


NAMES = ["a", "a.fc1", "a.fc10", "fc", r".*\.fc1$", "b", "type:x", "a|b", "predicate:me"]
TYPES = [nn.Linear, nn.Conv2d, nn.Embedding, torch.matmul, nn.functional.linear, torch.ops.aten.linear.default]
PREDICATES = [is_first, has_no_digit]
keys = st.sampled_from([*NAMES, *TYPES, *PREDICATES])


def values(spec: Field) -> st.SearchStrategy[Any]:
    """The default, and every other legal value of a small set."""
    return st.sampled_from([spec.default, *spec.choices])


@st.composite
def configs(draw: st.DrawFn, depth: int = 1, kinds: Any = tuple(CLASSES), lists: bool = True) -> BaseConfig:
    kind = draw(st.sampled_from(kinds))
    chosen = draw(st.lists(st.sampled_from(list(kind.fields) or ["-"]), max_size=3, unique=True))
    given_ = {n: draw(values(kind.fields[n])) for n in chosen if n in kind.fields and n != "white_list"}
    if lists and draw(st.booleans()):
        wide = [n for n, f in kind.fields.items() if len(f.choices) > 1 and f.tunable and n != "white_list"]
        if wide:
            name = draw(st.sampled_from(wide))
            given_[name] = list(kind.fields[name].choices)
    config = kind(**given_)
    if "white_list" in kind._arguments() and draw(st.booleans()):
        config.white_list = draw(st.lists(keys, max_size=2, unique_by=str))
    if depth:
        for key in draw(st.lists(keys, max_size=3, unique_by=str)):
            other = draw(st.booleans())
            inner = draw(configs(depth=0, kinds=tuple(CLASSES) if other else (kind,), lists=lists))
            config.set_local(key, inner.global_config)
    return config


@settings(max_examples=200)
@given(configs(depth=2))
def test_files_give_configs_back(config: BaseConfig) -> None:
    before = copy.deepcopy(config)
    text = config.to_json_string()
    back = type(config).from_dict(json.loads(text))
    assert back == config == before and back.to_json_string() == text
    assert repr(back) == repr(config) and list(back.local_config) == list(config.local_config)


@settings(max_examples=100)
@given(st.lists(configs(depth=1), max_size=4))
def test_compositions_come_back_too(members: list[BaseConfig]) -> None:
    whole = c.ComposableConfig(members)
    back = c.ComposableConfig.from_dict(json.loads(whole.to_json_string()))
    by_name = sorted(members, key=lambda m: [x.name for x in members].index(m.name))  # one algorithm after the other
    assert back.config_list == by_name
    assert back.to_json_string() == whole.to_json_string()


paths = st.lists(st.sampled_from(["a", "b", "fc", "fc1", "fc10", "head"]), min_size=1, max_size=3).map(".".join)
trees = st.lists(
    st.tuples(paths, st.sampled_from(["Linear", "Conv2d", "Embedding"])), max_size=8, unique_by=lambda x: x[0]
)


FITS = ["all", "type", "implied", "predicate", "name", "path"]
SAME = {"Linear": [nn.Linear, nn.functional.linear, torch.ops.aten.linear.default], "Conv2d": [nn.Conv2d],
        "Embedding": [nn.Embedding]}  # fmt: skip


def fit(key: Any, path: str, kind: str) -> str | None:
    if isinstance(key, str):
        return "path" if key == path else "name" if re.match(key, path) else "type" if key == kind else None
    if key in PREDICATES:
        return "predicate" if key(OperatorInfo(path, kind, kind)) else None
    return "type" if key in SAME[kind] else None


def by_search(config: BaseConfig, path: str, kind: str) -> tuple[int, BaseConfig] | None:
    """What the documentation says, in so many words: (how it fits, the config)."""
    plain, listed = config.global_config, [] if config.white_list == "*" else config.white_list
    local = [(how, x) for key, x in config.local_config.items() if (how := fit(key, path, kind))]
    white = [(how, plain) for key in listed if (how := fit(key, path, kind))]
    if not any(how in ("predicate", "name", "path") for how, _ in white + local):
        local = [("implied", x) for name, x in config.implied() if re.match(name, path)] + local
    every = config.white_list == "*" and (not config.scope or kind.lower() in config.scope.split(","))
    found = local or white or ([("all", plain)] if every else [])
    best = max([(FITS.index(how), i) for i, (how, _) in enumerate(found)], default=None)
    return None if best is None else (best[0], found[best[1]][1])


@settings(max_examples=200)
@given(configs(depth=1, lists=False), trees)
def test_each_module_gets_what_a_search_says(config: BaseConfig, tree: list[tuple[str, str]]) -> None:
    mapping = config.to_config_mapping(model_info=tree)
    for path, kind in tree:
        assert mapping.get((path, kind)) == (by_search(config, path, kind) or (0, None))[1]
    assert set(mapping) <= set(tree)


@settings(max_examples=100)
@given(st.lists(configs(depth=1, lists=False), min_size=1, max_size=3), trees)
def test_a_composition_gives_each_module_to_the_highest_priority(
    members: list[BaseConfig], tree: list[tuple[str, str]]
) -> None:
    mapping = config_mapping(members, tree)
    for path, kind in tree:
        rank = [-1 if m.yields else m.priority for m in members]
        claims = [(rank[i], i, x) for i, m in enumerate(members) if (x := by_search(m, path, kind)) is not None]
        gives = {id(x): 0 if x.leaves_float() else 1 if x.half is not None else 2 for *_, (_, x) in claims}
        ranked = [(gives[id(x)], priority, how, i, x) for priority, i, (how, x) in claims]
        expected = max(ranked, key=lambda claim: claim[:4], default=(None,))[-1]
        assert mapping.get((path, kind)) == expected


# ------------------------------------------------------------------------------------------------------------ examples
def test_adding_changes_nothing() -> None:
    a, b = c.RTNConfig(bits=8).set_local("head", c.RTNConfig(dtype="fp32")), c.GPTQConfig(white_list=["a"])
    before = copy.deepcopy(a), copy.deepcopy(b)
    both = a + b
    assert isinstance(both, c.ComposableConfig) and both.config_list == [a, b] and (a, b) == before
    three = both + c.HQQConfig()
    assert len(three.config_list) == 3 and len(both.config_list) == 2
    assert (a + (b + c.HQQConfig())) == three
    mapping = both.to_config_mapping(model_info=[("a.fc", "Linear"), ("b", "Linear"), ("head", "Linear")])
    assert mapping["a.fc", "Linear"] == b.global_config  # priority 90 before 80
    assert mapping["b", "Linear"] == a.global_config and mapping["head", "Linear"].dtype == "fp32"
    with pytest.raises(TypeError):
        a + 3  # type: ignore[operator]
    with pytest.raises(ConfigError, match="before adding them"):
        both.set_local("a", a)


def test_the_head_of_a_language_model_stays_float_unless_asked_for() -> None:
    info = [("model.fc", "Linear"), ("lm_head", "Linear")]
    for kind in (c.RTNConfig, c.GPTQConfig, c.AWQConfig, c.TEQConfig, c.HQQConfig):
        config = kind()
        mapping = config.to_config_mapping(model_info=info)
        assert mapping["lm_head", "Linear"].leaves_float() and mapping["model.fc", "Linear"] == config
        assert config == kind() and not config.local_config
        assert not kind(quant_lm_head=True).to_config_mapping(model_info=info)["lm_head", "Linear"].leaves_float()
        by_type = kind().set_local(nn.Linear, kind(bits=8)).to_config_mapping(model_info=info)
        assert by_type["lm_head", "Linear"].leaves_float() and by_type["model.fc", "Linear"].bits == 8
        by_name = kind().set_local("lm_head", kind(bits=8)).to_config_mapping(model_info=info)
        assert by_name["lm_head", "Linear"].bits == 8


def test_what_cannot_be_written_down_is_said() -> None:
    with pytest.raises(ConfigError, match=r"lambda.* cannot be written down"):
        c.RTNConfig().set_local(lambda operator: True, c.RTNConfig()).to_json_string()

    class Local(nn.Module):
        pass

    with pytest.raises(ConfigError, match="class inside of a function"):
        c.RTNConfig(white_list=[Local]).to_json_string()
    for key, kind in (
        ("type:no.such.Class", "type"),
        ("predicate:here:gone", "predicate"),
        ("type:torch.matmul", "type"),
    ):
        with pytest.raises(ConfigError, match=f"there is no {kind} .*\n  hint: import the module"):
            c.RTNConfig.from_dict({"global": {}, "local": {key: {}}})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (c.RTNConfig, {"bitz": 3}, "RTNConfig has no field 'bitz'\n  hint: did you mean 'bits'"),
        (c.RTNConfig, {"dtype": "foo"}, "RTNConfig.dtype must be one of 'int', "),
        (c.RTNConfig, {"bits": 0}, "bits must be a whole number from 1 to 8, not 0"),
        (c.RTNConfig, {"bits": True}, "bits must be a whole number"),
        (c.RTNConfig, {"bits": []}, "bits must be"),
        (c.RTNConfig, {"bits": [4, 99]}, "bits must be"),
        (c.RTNConfig, {"group_size": 0}, "group_size must be a whole number of at least 1 or -1"),
        (c.GPTQConfig, {"percdamp": float("nan")}, "percdamp must be a number from 0 to 1"),
        (c.SmoothQuantConfig, {"alpha": "best"}, "alpha must be a number from 0 to 1 or one of 'auto', not 'best'"),
        (c.SmoothQuantConfig, {"alpha_min": 0.9, "alpha_max": 0.1}, "alpha_min 0.9 is above alpha_max 0.1"),
        (c.SmoothQuantConfig, {"auto_alpha_args": {"alpha": 1}}, "auto_alpha_args must .*a dictionary with the keys"),
        (c.MXQuantConfig, {"w_dtype": "fp5"}, "w_dtype must be one of"),
        (c.MixedPrecisionConfig, {"dtype": "float16"}, "dtype must be one of 'fp16', 'bf16', 'fp32'.*\n.*'fp16'"),
        (c.FP8Config, {"white_list": []}, "FP8Config has no field 'white_list'"),
        (c.FP8Config, {"allowlist": {"name": []}}, "allowlist must be a dictionary with the keys 'names', 'types'"),
    ],
)  # fmt: skip
def test_bad_fields(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**values)
