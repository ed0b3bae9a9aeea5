"""Patterns fit what they say, bind what they name, and tell why they do not fit."""

from __future__ import annotations

from typing import Any as Anything

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from inc_graph.capture import capture
from inc_graph.errors import PatternError
from inc_graph.pattern import Any, Attr, Const, Match, NoMatch, Opt, Or, Out, P, match

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.plain = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> Anything:
        y = self.fc(x)
        z = torch.relu(y + 1) + y  # `y` has two users
        a, b = self.plain(z).chunk(2, 1)
        return F.gelu(a * a) + b * 2.0, self.conv(image).mean((2, 3), keepdim=True), torch.cat([a, b], 1)


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    return capture(Net(), (torch.randn(2, 4), torch.randn(1, 1, 4, 4)))


def call(gm: fx.GraphModule, target: Anything, index: int = 0) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[index]


def test_call_with_bindings(gm: fx.GraphModule) -> None:
    node = call(gm, aten.linear.default)
    m = match(P(aten.linear.default, Any("x"), Attr("w"), Any("b"), name="linear"), node)
    assert isinstance(m, Match) and m and m.root is node and m.nodes == (node,)
    assert m["x"].op == "placeholder" and m["w"].target == "fc.weight" and m["linear"] is node
    assert m.get("nothing") is None
    plain = call(gm, aten.linear.default, 1)
    m = match(P(aten.linear.default, Any(), Attr("w"), Any("b")), plain)
    assert m["b"] is None and set(m.bindings) == {"w", "b"}


def test_packets_tuples_and_functions(gm: fx.GraphModule) -> None:
    add = call(gm, aten.add.Tensor)
    assert match(P(aten.add), add) and match(P((aten.mul, aten.add.Tensor)), add)
    assert not match(P(aten.add.Scalar), add)
    assert aten.add.Tensor in P(aten.add).targets()
    with pytest.raises(PatternError, match="'add' is not an operator"):
        P("add")


def test_constants_and_defaults(gm: fx.GraphModule) -> None:
    conv, mean = call(gm, aten.conv2d.default), call(gm, aten.mean.dim)
    assert match(P(aten.conv2d, Any(), Any(), Any(), [1, 1], (1, 1), [1, 1], groups=1), conv)
    assert match(P(aten.conv2d, dilation=Const(name="d")), conv)["d"] == [1, 1]
    assert "is not [2, 2]" in str(match(P(aten.conv2d, stride=[2, 2]), conv))
    assert match(P(aten.mean.dim, Any(), [2, 3], keepdim=True), mean)
    assert not match(P(aten.mean.dim, keepdim=1), mean)  # 1 is not True
    assert not match(P(aten.mean.dim, keepdim=False), mean)
    assert "fewer arguments" in str(match(P(aten.mean.dim, nothing=1), mean))
    assert "not a constant" in str(match(P(aten.mean.dim, Const()), mean))
    assert not match(P(aten.cat, Const()), call(gm, aten.cat.default))  # a list of nodes is no constant


def test_none_and_missing_arguments(gm: fx.GraphModule) -> None:
    assert match(P(aten.linear, Any(), Any(), None), call(gm, aten.linear.default, 1))
    assert not match(P(aten.linear, Any(), Any(), None), call(gm, aten.linear.default, 0))


def test_commutative(gm: fx.GraphModule) -> None:
    top = call(gm, aten.add.Tensor, 1)  # relu(y + 1) + y
    relu = P(aten.relu, P(aten.add, Any("y"), 1))
    assert match(P(aten.add, relu, Any("y")), top)
    assert not match(P(aten.add, Any("y"), relu), top)
    m = match(P(aten.add, Any("y"), relu, commutative=True), top)
    assert m and m["y"] is call(gm, aten.linear.default) and len(m.nodes) == 3
    with pytest.raises(PatternError, match="first two"):
        P(aten.add, Any(), commutative=True)


def test_equal_names_bind_equal_values(gm: fx.GraphModule) -> None:
    square = P(aten.mul, Any("a"), Any("a"))
    assert match(square, call(gm, aten.mul.Tensor, 0))
    miss = match(square, call(gm, aten.mul.Tensor, 1))
    assert not miss and "'a' is already" in miss.reason


def test_backtracking_over_alternatives(gm: fx.GraphModule) -> None:
    top = call(gm, aten.add.Tensor, 1)
    relu = call(gm, aten.relu.default)
    # the first alternative fits the left side, but then the right one does not agree
    either = Or(P(aten.relu, Any("y")), P(aten.relu, P(aten.add, Any("y"), Any())))
    m = match(P(aten.add, either, Any("y")), top)
    assert m and relu in m.nodes and len(m.nodes) == 3
    assert either.targets() == set(P(aten.relu).ops) and Or(Any(), P(aten.relu)).targets() is None


def test_optional_call(gm: fx.GraphModule) -> None:
    linear = P(aten.linear, Any("x"), Attr("w"), Any("b"))
    pattern = Opt(P(aten.relu, Opt(P(aten.add, linear, 1, name="plus")), name="act"))
    full = match(pattern, call(gm, aten.relu.default))
    bare = match(pattern, call(gm, aten.linear.default))
    assert full["act"] and full["plus"] and full["w"] is bare["w"] and bare.get("act") is None
    assert pattern.targets() == {*aten_all(aten.relu), *aten_all(aten.add), *aten_all(aten.linear)}
    assert pattern.depth() == 3
    with pytest.raises(PatternError, match="Opt takes a P"):
        Opt(Any())  # type: ignore[arg-type]


def aten_all(packet: Anything) -> set[Anything]:
    return {getattr(packet, o) for o in packet.overloads()}


def test_outputs(gm: fx.GraphModule) -> None:
    split = P(aten.split, Any("x"), 2, 1)
    gelu = call(gm, aten.gelu.default)
    first = match(P(aten.gelu, P(aten.mul, Out(0, split, name="half"), Any())), gelu)
    assert first and first["half"].args[1] == 0
    miss = match(P(aten.gelu, P(aten.mul, Out(1, split), Any())), gelu)
    assert "0 is not 1" in str(miss)
    assert match(Out(None, split), first["half"])
    assert Out(0, split).targets() == {first["half"].target} and Out(0, split).depth() == 2


def test_single_use(gm: fx.GraphModule) -> None:
    top = call(gm, aten.add.Tensor, 1)
    fine = P(aten.add, P(aten.relu, Any(), single_use=True), Any())
    assert match(fine, top)
    miss = match(P(aten.add, Any(), P(aten.linear, single_use=True)), top)
    assert str(miss) == "linear: has 2 users, must have one"


def test_the_deepest_complaint_is_kept(gm: fx.GraphModule) -> None:
    top = call(gm, aten.add.Tensor, 1)
    deep = P(aten.relu, P(aten.add, P(aten.linear, Any(), Any(), None), Any()))
    miss = match(P(aten.add, Or(P(aten.tanh), deep, P(aten.sigmoid)), Any()), top)
    assert isinstance(miss, NoMatch) and not miss
    assert miss.depth == 4 and miss.node.target == "fc.bias" and "get_attr is not a constant" in miss.reason
    shallow = match(P(aten.tanh), top)
    assert shallow.depth == 0 and "aten.add.Tensor is not aten.tanh" in shallow.reason


def test_other_roots(gm: fx.GraphModule) -> None:
    x = gm.graph.find_nodes(op="placeholder")[0]
    assert match(Any("x"), x)["x"] is x and not match(Attr(), x)
    assert match(Attr("w"), next(iter(gm.graph.find_nodes(op="get_attr"))))
