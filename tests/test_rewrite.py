"""The rule driver: it settles, costs little, reports, and names rules that never settle."""

from __future__ import annotations

import operator
import time
from typing import Any as Anything

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inc_graph import graph as g
from inc_graph.capture import capture
from inc_graph.errors import PatternError
from inc_graph.pattern import Any, Attr, Const, Match, P
from inc_graph.rewrite import Rule, apply_rules
from inc_graph.text import to_text
from inc_graph.verify import verify

aten = torch.ops.aten


def to_value(name: str) -> Anything:
    def rewrite(gm: fx.GraphModule, m: Match) -> None:
        g.replace_uses(m.root, m[name])

    return rewrite


def to_op(op: Anything, *names: str) -> Anything:
    def rewrite(gm: fx.GraphModule, m: Match) -> None:
        g.replace_uses(m.root, g.insert_call(gm, op, tuple(m[n] for n in names), before=m.root, like=m.root))

    return rewrite


double_neg = Rule("double-neg", P(aten.neg, P(aten.neg, Any("x"))), to_value("x"))
mul_one = Rule("mul-one", P(aten.mul, Any("x"), 1.0), to_value("x"))
sin_to_cos = Rule("sin-to-cos", P(aten.sin, Any("x")), to_op(aten.cos.default, "x"))
cos_to_tan = Rule("cos-to-tan", P(aten.cos, Any("x")), to_op(aten.tan.default, "x"))
tan_to_sin = Rule("tan-to-sin", P(aten.tan, Any("x")), to_op(aten.sin.default, "x"))


CYCLE = [sin_to_cos, cos_to_tan, tan_to_sin]


def trace(function: Anything, *args: torch.Tensor) -> fx.GraphModule:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, *xs: torch.Tensor) -> Anything:
            return function(self, *xs)

    return capture(Model(), args or (torch.randn(3),))


def ops(gm: fx.GraphModule) -> list[str]:
    return [n.target._schema.name.partition("::")[2] for n in gm.graph.nodes if n.op == "call_function"]


def chain(target: Anything, length: int) -> fx.GraphModule:
    graph, mode = fx.Graph(), FakeTensorMode()
    with mode:
        value = torch.empty(3)
    node = graph.placeholder("x")
    node.meta["val"] = value
    for _ in range(length):
        node = graph.call_function(target, (node,))
        node.meta["val"] = value
    graph.output((node,))
    return fx.GraphModule(nn.Module(), graph)


def test_rules_apply_everywhere_until_nothing_fits() -> None:
    gm = trace(lambda m, x: ((x * 1.0).neg() * 1.0).neg().neg().neg() + m.w)
    x = torch.randn(3)
    want = gm(x)
    report = apply_rules(gm, [double_neg, mul_one])
    g.erase_dead(gm)
    verify(gm)
    assert ops(gm) == ["add"] and torch.equal(gm(x), want)
    assert report.applied == {"double-neg": 2, "mul-one": 2} and report.modified and not report.unused()
    assert len(report.matched) == 4
    again = apply_rules(gm, [double_neg, mul_one])
    assert not again.modified and again.unused() == ["double-neg", "mul-one"]


def test_earlier_rules_go_first_and_cascade() -> None:
    gm = trace(lambda m, x: x.sin())
    other = Rule("other", P(aten.sin, Any("x")), to_op(aten.abs.default, "x"))
    assert apply_rules(gm, [sin_to_cos, cos_to_tan, other]).applied == {"sin-to-cos": 1, "cos-to-tan": 1, "other": 0}
    assert ops(gm) == ["tan"]


def test_matched_nodes_with_other_users_stay() -> None:
    gm = trace(lambda m, x: ((y := x.neg()).neg(), y))
    apply_rules(gm, [double_neg])
    assert ops(gm) == ["neg"]
    gm.recompile()
    x = torch.randn(3)
    assert torch.equal(gm(x)[0], x)


def test_provenance_and_metadata_of_new_nodes() -> None:
    gm = trace(lambda m, x: x.sin())
    with g.editing("my-pass"):
        apply_rules(gm, [sin_to_cos])
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.cos.default)
    assert g.peek_meta(node)["provenance"] == ["my-pass/sin-to-cos"]
    assert g.shape(node) == (3,) and "stack_trace" in node.meta


def test_misses_are_reported_with_the_closest() -> None:
    gm = trace(lambda m, x: (x.sin() * 2.0 + m.w, x.cos() * 1.0 + x))
    rule = Rule("fold", P(aten.add, P(aten.mul, P(aten.cos, Any()), Const(2.0)), Attr()), to_value("x"))
    report = apply_rules(gm, [rule])
    assert [m.depth for m in report.misses] == [2, 3] and report.applied == {"fold": 0}
    closest = report.closest("fold")
    assert closest.node == "add_1" and "1.0 is not 2.0" in closest.reason
    assert report.closest("other") is None


def test_checks_refuse_with_a_reason() -> None:
    gm = trace(lambda m, x: x.sin().sin())
    rule = Rule(
        "once", P(aten.sin, Any("x")), to_op(aten.cos.default, "x"),
        check=lambda m: None if m["x"].op == "placeholder" else "not at the input",
    )  # fmt: skip
    report = apply_rules(gm, [rule])
    assert ops(gm) == ["cos", "sin"] and report.applied == {"once": 1}
    assert [(m.node, m.reason) for m in report.misses] == [("sin_1", "sin_1: not at the input")]


def test_single_use_is_seen_again_when_other_users_go() -> None:
    gm = trace(lambda m, x: ((y := x.sin()).neg() + y * 1.0 * 0.0).abs())
    only = Rule("only", P(aten.neg, P(aten.sin, Any("x"), single_use=True)), to_op(aten.cos.default, "x"))
    drop = Rule("drop", P(aten.add, Any("a"), P(aten.mul, Any(), 0.0)), to_value("a"))
    report = apply_rules(gm, [only, drop])
    g.erase_dead(gm)
    # the unused product is dead but still reads `y` until it is erased, so one more application may be needed
    report2 = apply_rules(gm, [only, drop])
    g.erase_dead(gm)
    assert report.applied["drop"] == 1 and report.applied["only"] + report2.applied["only"] == 1
    assert ops(gm) == ["cos", "abs"]


@pytest.mark.parametrize("rules", [CYCLE, [*CYCLE[1:], double_neg, CYCLE[0]]])
def test_rules_that_undo_each_other_are_named(rules: list[Rule]) -> None:
    with pytest.raises(PatternError) as caught:
        apply_rules(chain(aten.sin.default, 50), rules)
    text = str(caught.value)
    assert "undo each other: 'cos-to-tan', 'sin-to-cos', 'tan-to-sin'" in text and "double-neg" not in text


def test_a_rule_that_feeds_itself_is_named() -> None:
    grow = Rule("grow", P(aten.sin, Any("x")), to_op(aten.sin.default, "x"))
    with pytest.raises(PatternError, match="rule 'grow' applies to its own result"):
        apply_rules(chain(aten.sin.default, 3), [grow])


def test_a_rule_that_edits_in_place_without_end_is_named() -> None:
    def touch(gm: fx.GraphModule, m: Match) -> None:
        m.root.meta["touched"] = True

    with pytest.raises(PatternError, match="rule 'touch' applies to its own result"):
        apply_rules(chain(aten.sin.default, 3), [Rule("touch", P(aten.sin), touch)])


@pytest.mark.parametrize("fuel", [0, 1, 3, 10])
def test_fuel(fuel: int) -> None:
    gm = chain(aten.sin.default, 6)
    report = apply_rules(gm, [sin_to_cos], fuel=fuel)
    assert ops(gm).count("cos") == min(fuel, 6) == report.applied["sin-to-cos"]
    assert report.out_of_fuel == (fuel < 6)
    other = chain(aten.sin.default, 6)
    with g.editing("p", g.Fuel(fuel)):
        apply_rules(other, [sin_to_cos])
    assert to_text(other) == to_text(gm)


def test_rules_at_any_node_and_duplicates() -> None:
    gm = trace(lambda m, x: x.sin() + m.w)
    seen: list[str] = []
    look = Rule("look", Any("n"), to_value("n"), check=lambda m: seen.append(m["n"].op) or "only looking")
    apply_rules(gm, [look, sin_to_cos])
    assert {"placeholder", "get_attr", "call_function", "output"} <= set(seen) and "cos" in ops(gm)
    with pytest.raises(PatternError, match="same name"):
        apply_rules(gm, [look, look])


def test_a_rewrite_may_apply_rules_itself() -> None:
    def nested(gm: fx.GraphModule, m: Match) -> None:
        new = g.insert_call(gm, aten.sin.default, (m["x"],), before=m.root)
        g.replace_uses(m.root, new)
        apply_rules(gm, [sin_to_cos])
        g.insert_call(gm, aten.abs.default, (m["x"],), before=m.root)

    gm = trace(lambda m, x: x.neg())
    apply_rules(gm, [Rule("nested", P(aten.neg, Any("x")), nested)])
    assert sorted(ops(gm)) == ["abs", "cos"] and "create_node" not in vars(gm.graph)


def test_long_chains_that_shrink_or_sink_are_fine() -> None:
    gm = chain(aten.neg.default, 501)
    assert apply_rules(gm, [double_neg]).applied == {"double-neg": 250} and ops(gm) == ["neg"]
    gm = chain(aten.sin.default, 200)  # one abs travels from the input to the output
    first = next(iter(gm.graph.find_nodes(op="placeholder")))
    g.replace_uses(first, g.insert_call(gm, aten.abs.default, (first,), after=first))
    swap = Rule(
        "sink", P(aten.sin, P(aten.abs, Any("x"))),
        lambda gm, m: g.replace_uses(m.root, _abs_of_sin(gm, m)) and None,
    )  # fmt: skip
    assert apply_rules(gm, [swap]).applied == {"sink": 200} and ops(gm)[-1] == "abs"


def _abs_of_sin(gm: fx.GraphModule, m: Match) -> fx.Node:
    inner = g.insert_call(gm, aten.sin.default, (m["x"],), before=m.root)
    return g.insert_call(gm, aten.abs.default, (inner,), before=m.root)


def rewrite_everywhere(length: int) -> float:
    gm = chain(aten.sin.default, length)
    start = time.perf_counter()
    apply_rules(gm, [sin_to_cos, cos_to_tan, double_neg])
    return time.perf_counter() - start


@pytest.mark.alone
@pytest.mark.slow
def test_cost_is_linear() -> None:
    rewrite_everywhere(100)
    small, large = rewrite_everywhere(1_000), rewrite_everywhere(10_000)
    assert large < 15 * small


def test_getitem_roots() -> None:
    gm = trace(lambda m, x: x.reshape(2, 2).chunk(2)[0], torch.randn(4))
    output = P(operator.getitem, Any("x"), Const(name="i"))
    seen = Rule("seen", output, to_value("x"), check=lambda m: f"output {m['i']}")
    assert [m.reason for m in apply_rules(gm, [seen]).misses] == ["getitem: output 0"]


def test_a_rule_may_go_on_for_long_as_long_as_it_ends() -> None:
    """x**n = x * x**(n - 1), three hundred times in a row in a graph of three nodes."""

    def unroll(gm: fx.GraphModule, m: Match) -> None:
        n = m.root.args[1]
        new = m["x"]
        if n > 1:
            rest = g.insert_call(gm, aten.pow.Tensor_Scalar, (m["x"], n - 1), before=m.root, like=m.root)
            new = g.insert_call(gm, aten.mul.Tensor, (m["x"], rest), before=m.root, like=m.root)
        g.replace_uses(m.root, new)

    gm = trace(lambda self, x: x**300)
    report = apply_rules(gm, [Rule("unroll", P(aten.pow.Tensor_Scalar, Any("x"), Const(name="n")), unroll)])
    assert report.applied["unroll"] == 300
    assert len(gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)) == 299
