"""Rules by name, type and predicate as annotate obeys them, and the patterns that they speak of."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inc_graph.errors import ConfigError, PassError, UnusedRuleWarning
from inc_graph.graph import peek_meta
from inc_graph.oppattern import OpPattern, pattern_of, register_pattern
from inc_graph.recipe import OpQuant, Where, names_of_type
from inc_graph.registry import PATTERNS
from inc_graph.spec import PerBlock, PerChannel, PerGroup, QSpec
from tests.passes.annotate_models import IMAGE, ROWS, SEQUENCE, SIGNED, Do, annotated, aten, groups, layers, quant
from tests.passes.pipelines import (
    INT8,
    U8,
    annotate,
    captured,
    find,
    find_one,
    kind,
    name,
    reads,
    recipe,
    run,
    why_float,
)


# -------------------------------------------------------------------------------------------------------------- rules
def test_rules_by_name() -> None:
    plan = recipe(name("block.1"), name("c$", SIGNED))
    model = Do(lambda m, x: m.c(m.block(x)), block=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), c=nn.Linear(4, 4))
    gm = annotate(model, ROWS, plan=plan).graph
    first, second, third = find(gm, "linear")
    assert peek_meta(second)["float"] == "kept float by set_local('block.1')"
    assert (peek_meta(first)["rule"], peek_meta(third)["rule"]) == (0, 2)
    assert quant(second)[peek_meta(third)["reads"][second.name]]["spec"]["qtype"] == "int8"


@pytest.mark.parametrize(
    "type_name",
    [
        "linear",
        "Linear",
        "torch.nn.modules.linear.Linear",
        "aten::linear",
        "aten.linear.default",
        "torch._C._nn.linear",
    ],
)
def test_rules_by_type(type_name: str) -> None:
    gm = annotate(Do(lambda m, x: m.a(x).relu(), **layers("a")), ROWS, plan=recipe(kind(type_name))).graph
    assert why_float(gm, "linear") == f"kept float by set_local({type_name})"


@pytest.mark.parametrize("what", [torch.matmul, torch.mm])
def test_a_product_that_became_a_linear_layer_still_has_its_type(what: Any) -> None:
    plan = recipe(kind(names_of_type(what)[1]))
    gm = annotated(lambda m, x: x @ m.w, ROWS, w=nn.Parameter(torch.ones(4, 4)), plan=plan)
    assert "kept float by" in why_float(gm, "linear")


def test_a_class_of_the_users_own() -> None:
    class Mine(nn.Linear):
        pass

    model = Do(lambda m, x: m.b(m.a(x)), a=Mine(4, 4), b=nn.Linear(4, 4))
    gm = annotate(model, ROWS, plan=recipe(kind("Mine"))).graph
    assert ["float" in peek_meta(n) for n in find(gm, "linear")] == [True, False]


def test_function_calls_go_by_their_name_in_the_graph() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)) @ m.linear(x) @ x.transpose(1, 2)

    gm = annotated(f, SEQUENCE, plan=recipe(name("matmul_1"), name("linear")), linear=nn.Linear(4, 4))
    assert ["float" in peek_meta(n) for n in find(gm, "matmul")] == [False, True, False]
    assert "float" in peek_meta(find_one(gm, "linear"))


def test_the_name_of_a_module_is_not_taken_for_the_name_of_a_node() -> None:
    """The node of module `fc` is called `linear`, and so is a module."""
    plan = recipe(name("linear"), name("conv2d"))
    with pytest.warns(UnusedRuleWarning, match="conv2d"):
        gm = annotated(lambda m, x: m.linear(m.fc(x)), ROWS, plan=plan, fc=nn.Linear(4, 4), linear=nn.Linear(4, 4))
    assert [n.name for n in find(gm, "linear")] == ["linear", "linear_1"]
    assert ["float" in peek_meta(n) for n in find(gm, "linear")] == [False, True]


def test_names_beat_types_and_the_last_word_counts() -> None:
    plan = recipe(name("a", SIGNED), name("a", INT8), kind("linear"))
    gm = annotated(lambda m, x: m.b(m.a(x)), ROWS, plan=plan, **layers("ab"))
    a, b = find(gm, "linear")
    assert peek_meta(a)["rule"] == 2 and peek_meta(b)["float"] == "kept float by set_local(linear)"


def test_a_carrier_obeys_rules_that_name_it() -> None:
    plan = recipe(kind("max_pool"))
    gm = annotated(lambda m, x: m.a(F.max_pool2d(m.a(x), 2)), IMAGE, plan=plan, a=nn.Conv2d(4, 4, 1))
    assert why_float(gm, "max_pool2d") == "kept float by set_local(max_pool)" and quant(find_one(gm, "max_pool2d"))


def test_unused_rules_are_named() -> None:
    plan = recipe(name("lost", SIGNED), kind("torch.nn.modules.conv.Conv2d"), name("a"), kind("linear", INT8))
    with pytest.warns(UnusedRuleWarning) as caught:
        annotated(lambda m, x: m.a(x), ROWS, plan=plan, **layers("a"))
    assert [str(w.message) for w in caught if "matched no" in str(w.message)] == [
        "set_local('lost') matched no operator of the model",
        "set_local(torch.nn.modules.conv.Conv2d) matched no operator of the model",
    ]
    assert [str(w.message) for w in caught if "never counts" in str(w.message)] == [
        "set_local(linear) never counts: set_local('a') beats it"
    ]


def test_used_rules_are_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedRuleWarning)
        annotated(lambda m, x: m.a(x).relu(), ROWS, plan=recipe(name("a"), kind("linear")), **layers("a"))


@pytest.mark.parametrize("where", [kind("relu"), kind("torch.nn.modules.activation.ReLU"), name("act")])
def test_a_rule_for_an_activation_function_alone_has_no_effect(where: Any) -> None:
    model = Do(lambda m, x: m.act(m.a(x)), act=nn.ReLU(), **layers("a"))
    with pytest.warns(UnusedRuleWarning, match="no effect by itself: an activation function is part of the operator"):
        gm = annotate(model, ROWS, plan=recipe(where)).graph
    assert reads(gm, "linear") == 1


@pytest.mark.parametrize(
    ("function", "f", "op"),
    [
        (F.relu, lambda m, x: F.relu(m.c(x)), "relu"),
        (F.relu6, lambda m, x: F.relu6(m.c(x)), "hardtanh"),
        (F.hardtanh, lambda m, x: F.hardtanh(m.c(x)), "hardtanh"),
        (F.silu, lambda m, x: F.silu(m.c(x)), "silu"),
        (F.gelu, lambda m, x: F.gelu(m.c(x)), "gelu"),
        (F.hardswish, lambda m, x: F.hardswish(m.c(x)), "hardswish"),
        (F.leaky_relu, lambda m, x: F.leaky_relu(m.c(x)), "leaky_relu"),
        (F.max_pool2d, lambda m, x: m.c(F.max_pool2d(x, 2)), "max_pool"),
        (F.adaptive_avg_pool2d, lambda m, x: m.c(F.adaptive_avg_pool2d(m.c(x), 2)), "avg_pool"),
        (F.avg_pool2d, lambda m, x: m.c(F.avg_pool2d(m.c(x), 2)), "avg_pool"),
        (F.conv2d, lambda m, x: m.c(x), "conv2d"),
        (F.linear, lambda m, x: m.a(x.flatten(2)[:, :, :4]), "linear"),
        (F.interpolate, lambda m, x: m.c(F.interpolate(x, scale_factor=2)), "upsample_nearest"),
        (F.pixel_shuffle, lambda m, x: F.pixel_shuffle(m.c(x), 2), "select"),
        (torch.flip, lambda m, x: torch.flip(m.c(x), [2]), "select"),
        (torch.transpose, lambda m, x: m.c(x.transpose(2, 3)), "reshape"),
        (torch.add, lambda m, x: m.c(m.c(x) + x), "add"),
        (operator.add, lambda m, x: m.c(m.c(x) + x), "add"),
        (operator.iadd, lambda m, x: m.c(m.c(x) + x), "add"),
        (torch.mul, lambda m, x: m.c(m.c(x) * x), "mul"),
        (operator.mul, lambda m, x: m.c(m.c(x) * x), "mul"),
    ],
)
def test_functions_name_the_type_of_their_operator(function: Any, f: Callable[..., Tensor], op: str) -> None:
    plan = recipe(kind(names_of_type(function)[1]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = annotated(f, IMAGE, plan=plan, c=nn.Conv2d(4, 4, 1), a=nn.Linear(4, 4))
    spoken_of = [
        p.name for n in gm.graph.nodes if (p := pattern_of(n)) is not None and plan.rules[1].where.matches(n, p)
    ]
    assert spoken_of and set(spoken_of) == {op}
    assert not any("matched no operator" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (OpQuant(), "the rule leaves both its inputs and its weight float"),
        (OpQuant(U8, QSpec("int8", "symmetric", PerBlock((1, 1, 2)))), "has 3 sizes but the tensor has 2 dimensions"),
        (OpQuant(QSpec("int8", "symmetric", PerChannel(5)), INT8.weight), "does not fit a tensor with 2 dimensions"),
    ],
)
def test_rules_that_do_not_fit(what: OpQuant, reason: str) -> None:
    gm = annotated(lambda m, x: m.a(x), ROWS, plan=recipe(everything=what), **layers("a"))
    assert reason in why_float(gm, "linear")


def test_weights_only() -> None:
    what = OpQuant(None, QSpec("int4", "symmetric", PerGroup(2)), bias_correction=True)
    mask = torch.ones(3, 4, dtype=torch.bool)
    gm = annotated(
        lambda m, x, k: (m.a(x) + x @ x.t() @ x, m.a(k.float())),
        ROWS,
        mask,
        plan=recipe(everything=what),
        **layers("a"),
    )
    assert not groups(gm) and "it has no weight" in peek_meta(find(gm, "matmul")[0])["float"]
    notes = [peek_meta(n)["weight"] for n in find(gm, "linear")]
    assert [n["spec"]["granularity"]["sizes"] for n in notes] == [[1, 2], [1, 2]] and "correct_bias" not in notes[0]


def test_inputs_only() -> None:
    gm = annotated(lambda m, x: m.a(x), ROWS, plan=recipe(everything=OpQuant(U8)), **layers("a"))
    assert reads(gm, "linear") == 1 and "weight" not in peek_meta(find_one(gm, "linear"))


def test_a_graph_without_a_recipe() -> None:
    with pytest.raises(ConfigError, match="carries no recipe"):
        run(captured(nn.Linear(4, 4), ROWS), "annotate")


# ----------------------------------------------------------------------------------------------------------- patterns
def test_a_new_pattern_and_its_removal() -> None:
    gm = annotated(lambda m, x: m.a(torch.erf(m.a(x))), ROWS, **layers("a"))
    assert why_float(gm, "erf") == "no quantization pattern for this operator"
    register_pattern(OpPattern("erf", (aten.erf.default,), role="follower"))
    try:
        gm = annotated(lambda m, x: m.a(torch.erf(m.a(x))), ROWS, **layers("a"))
        assert reads(gm, "erf") == 1
    finally:
        PATTERNS.remove("erf")
    assert pattern_of(find_one(gm, "erf")) is None


def test_two_patterns_for_one_operator_are_an_error_every_time() -> None:
    register_pattern(OpPattern("other", (aten.linear.default,)))
    try:
        for _ in range(2):
            with pytest.raises(PassError, match="claimed by the patterns 'linear' and 'other'"):
                annotated(lambda m, x: m.a(x), ROWS, **layers("a"))
    finally:
        PATTERNS.remove("other")
        register_pattern(PATTERNS.get("linear"))  # forgets the half index


def test_where_needs_a_kind_and_a_regular_expression() -> None:
    with pytest.raises(ConfigError, match="one of all, type, implied, predicate, name"):
        Where("module", "a")
    with pytest.raises(ConfigError, match="not a regular expression"):
        Where("name", "a(")
