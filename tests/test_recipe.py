"""Recipes as values: JSON and back, one spelling of algorithms, errors that name what is wrong."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inc_graph.errors import ConfigError, IncError, UnknownNameError
from inc_graph.graph import clone
from inc_graph.oppattern import OpPattern, argument, set_arguments
from inc_graph.options import make_estimator, parse_algorithm
from inc_graph.recipe import KINDS, OpQuant, Recipe, Where, WhereRule, get_recipe, names_of_type, set_recipe
from inc_graph.spec import PerChannel, PerGroup, PerTensor, QSpec
from tests.passes.pipelines import captured, find_one, kind, name, recipe

words = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12)
names = st.sampled_from(["", "a", r"layers\.\d+", "block.1$", "(a|b)", "linear_3"])
integers = st.builds(QSpec, st.sampled_from(["uint8", "int8", "int4"]), st.sampled_from(["symmetric", "asymmetric"]))
blocks = st.sampled_from([PerChannel(1), PerGroup(32), PerTensor()])
specs = integers | st.builds(QSpec, st.sampled_from(["int8", "fp8_e4m3", "nf4"]), st.just("symmetric"), blocks)
algorithms = st.sampled_from(["minmax", "percentile{percent=99.9}", "mse", "histogram_mse{bins=512}"])
op_quants = st.builds(OpQuant, st.none() | specs, st.none() | specs, algorithms, algorithms, st.booleans())
wheres = st.one_of(st.just(Where()), st.builds(Where, st.just("type"), words), st.builds(Where, st.just("name"), names))
rules = st.builds(WhereRule, wheres, st.none() | op_quants, words)
recipes = st.builds(
    Recipe,
    words,
    st.lists(rules, max_size=4).map(tuple),
    words,
    words,
    st.none() | st.lists(words, max_size=3).map(tuple),
    words,
)


# -------------------------------------------------------------------------------------------------------------- values
@given(recipes)
def test_json_round_trip(plan: Recipe) -> None:
    data = plan.to_json()
    text = json.dumps(data)
    assert Recipe.from_json(json.loads(text)) == plan and json.dumps(Recipe.from_json(data).to_json()) == text
    assert hash(plan) == hash(Recipe.from_json(data)) and str(plan)


def test_a_recipe_rides_with_its_graph() -> None:
    gm, plan = captured(nn.Linear(2, 2), torch.ones(1, 2)), recipe(name("a"), kind("linear"))
    with pytest.raises(ConfigError, match="carries no recipe"):
        get_recipe(gm)
    set_recipe(gm, plan)
    assert get_recipe(gm) == get_recipe(clone(gm)) == get_recipe(copy.deepcopy(gm)) == plan


GOOD = recipe(name("a", OpQuant(QSpec("uint8", "asymmetric"), QSpec("int8")))).to_json()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("method",), 3, "Recipe.method cannot be 3"),
        (("rules",), "all", "Recipe.rules cannot be 'all'"),
        (("supported",), "conv2d", "Recipe.supported cannot be 'conv2d'"),
        (("more",), 1, "Recipe has the fields"),
        (("rules", 1, "where", "kind"), "module", "Where.kind must be one of all, type, implied, predicate, name"),
        (("rules", 1, "where", "value"), None, "Where.value cannot be None"),
        (("rules", 1, "where", "value"), "(", "not a regular expression"),
        (("rules", 1, "origin"), [], "WhereRule.origin cannot be"),
        (("rules", 1, "what", "bias_correction"), "no", "OpQuant.bias_correction cannot be 'no'"),
        (("rules", 1, "what", "act_algorithm"), None, "OpQuant.act_algorithm cannot be None"),
        (("rules", 1, "what", "weight", "qtype"), "int9", "int9"),
        (("rules", 1, "what", "weight"), [], "not a QSpec"),
        (("rules", 1, "what"), [], "OpQuant has the fields"),
        (("rules", 1), None, "WhereRule has the fields"),
    ],
)
def test_damaged_json(path: tuple[Any, ...], value: Any, message: str) -> None:
    data: Any = copy.deepcopy(GOOD)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(IncError, match=message.replace("(", r"\(")):
        Recipe.from_json(data)


@pytest.mark.parametrize("gone", list(GOOD))
def test_missing_fields(gone: str) -> None:
    with pytest.raises(ConfigError, match=rf"Recipe has the fields .*'{gone}'"):
        Recipe.from_json({k: v for k, v in GOOD.items() if k != gone})


def test_for_another_backend() -> None:
    plan = recipe(name("a")).for_backend("tiny", ("linear",))
    assert (plan.backend, plan.supported, plan.rules) == ("tiny", ("linear",), recipe(name("a")).rules)


def test_text() -> None:
    shown = str(recipe(name("a"), kind("linear", OpQuant(None, QSpec("int8")))))
    assert "0. all -> activation uint8 asymmetric per_tensor, weight int8" in shown
    assert "1. name 'a' -> float" in shown and "2. type 'linear' -> weight int8 symmetric per_tensor" in shown
    assert KINDS == ("all", "type", "implied", "predicate", "name")


def test_names_of_types() -> None:
    assert names_of_type(nn.Linear) == ("Linear", "torch.nn.modules.linear.Linear")
    assert names_of_type(torch.matmul)[0] == "matmul"


# ---------------------------------------------------------------------------------------------------------- algorithms
@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("minmax", ("minmax", {})),
        (" percentile { percent = 99.5 } ", ("percentile", {"percent": 99.5})),
        ("a{x=1,y=-2.5e3,z=true,w=none,v=word}", ("a", {"x": 1, "y": -2500.0, "z": True, "w": None, "v": "word"})),
        ("a{}", ("a", {})),
    ],
)
def test_algorithms_as_text(text: str, want: tuple[str, dict[str, Any]]) -> None:
    assert parse_algorithm(text) == want


@pytest.mark.parametrize("text", ["", "1x", "a{x=1", "a{x=1}}", "a{{x=1}}", "a b", "a{x}", "a{x=1,x=2}", None, 3])
def test_bad_algorithms(text: Any) -> None:
    with pytest.raises(ConfigError):
        parse_algorithm(text)


def test_estimators_by_text() -> None:
    assert make_estimator("percentile{percent=99}").percent == 99  # type: ignore[attr-defined]
    with pytest.raises(UnknownNameError, match="minmx"):
        make_estimator("minmx")
    with pytest.raises(ConfigError, match="no option 'percnt'"):
        make_estimator("percentile{percnt=99}")


# ----------------------------------------------------------------------------------------------------------- arguments
def test_arguments_by_position() -> None:
    gm = captured(nn.Conv2d(2, 2, 1, stride=2), torch.ones(1, 2, 4, 4))
    node = find_one(gm, "conv2d")
    assert argument(node, 3) == [2, 2] and argument(node, 6) == 1 and argument(node, 9) is None
    bias = node.args[2]
    node.args, node.kwargs = node.args[:2], {"bias": bias, "stride": [2, 2], "groups": 1}
    assert argument(node, 2) is bias and argument(node, 3) == [2, 2]
    set_arguments(node, {2: None})
    assert node.args[2] is None and node.kwargs == {"stride": [2, 2], "groups": 1}
    set_arguments(node, {4: [1, 1]})
    assert node.args[3:] == ([2, 2], [1, 1]) and node.kwargs == {"groups": 1}
    gm.recompile()
    assert gm(torch.ones(1, 2, 4, 4)).shape == (1, 2, 3, 3)


def test_patterns_have_a_role() -> None:
    with pytest.raises(IncError, match="role must be one of"):
        OpPattern("x", (), role="layer")
