"""Edits that must not change the meaning of a random model: they do not, and the graph stays in normal form."""

from __future__ import annotations

import copy
import random
from typing import Any as Anything

import pytest
import torch
from torch import fx

from inc_graph import graph as g
from inc_graph.alias import Aliases
from inc_graph.capture import capture
from inc_graph.pattern import Any, Match, P
from inc_graph.rewrite import Rule, apply_rules
from inc_graph.text import diff, to_text
from inc_graph.verify import verify
from tests.graph_generator import RandomModel

aten = torch.ops.aten
SEEDS = range(10)


def prepared(seed: int) -> tuple[RandomModel, fx.GraphModule]:
    model = RandomModel(seed, 12)
    args, kwargs = model.inputs()
    return model, capture(model, args, kwargs)


def same_meaning(model: RandomModel, gm: fx.GraphModule, runs: int = 2) -> None:
    """Results and written buffers agree bit for bit, over several runs."""
    twin = copy.deepcopy(model)
    gm = g.clone(gm)
    for name in ("state", "calls"):  # fresh buffers: a clone shares them
        if name in gm._buffers:
            gm._buffers[name] = getattr(twin, name).clone()
    for run in range(runs):
        args, kwargs = model.inputs(run + 1)
        with torch.no_grad():
            torch.testing.assert_close(gm(*args, **kwargs), twin(*args, **kwargs), rtol=0, atol=0)
    for name in ("state", "calls"):
        if name in gm._buffers:
            assert torch.equal(gm.get_buffer(name), getattr(twin, name))


def floats(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op in ("call_function", "placeholder") and g.is_float(n) and n.users]


def add_noise(gm: fx.GraphModule, rng: random.Random) -> None:
    """Wrap random float values in pairs of operators that undo each other exactly."""
    pairs: list[tuple[Anything, tuple, Anything, tuple]] = [
        (aten.neg.default, (), aten.neg.default, ()),
        (aten.mul.Tensor, (1.0,), aten.mul.Tensor, (1.0,)),
        (aten.unsqueeze.default, (0,), aten.squeeze.dim, (0,)),
    ]
    for node in rng.sample(nodes := floats(gm), max(1, len(nodes) // 3)):
        first, a, second, b = rng.choice(pairs)
        users = [u for u in node.users if u.target is not aten.copy_.default]
        if not users:
            continue
        one = g.insert_call(gm, first, (node, *a), after=_after(node))
        two = g.insert_call(gm, second, (one, *b), after=one)
        g.replace_uses(node, two, only=rng.sample(users, rng.randint(1, len(users))))


def _after(node: fx.Node) -> fx.Node:
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def copy_weights(gm: fx.GraphModule, rng: random.Random) -> None:
    """Give random readers a copy of their weight under a new name, as an edit of a tied weight does."""
    index = Aliases(gm)
    for read in list(gm.graph.find_nodes(op="get_attr")):
        if read.target in g.mutated_attrs(gm) or not g.is_float(read) or not read.users:
            continue
        user = rng.choice(g.users_of(read))
        name = g.set_tensor(gm, read.target, g.get_tensor(gm, read).clone(), buffer=rng.random() < 0.5)
        assert user in index.users(read.target)
        g.replace_uses(read, g.insert_get_attr(gm, user, name), only=[user])


def to_x(gm: fx.GraphModule, m: Match) -> None:
    g.replace_uses(m.root, m["x"])


SIMPLIFY = [
    Rule("neg-neg", P(aten.neg, P(aten.neg, Any("x"))), to_x),
    Rule("mul-one", P(aten.mul.Tensor, Any("x"), 1.0), to_x),
    Rule("squeeze", P(aten.squeeze.dim, P(aten.unsqueeze, Any("x"), 0), 0), to_x),
]


@pytest.mark.parametrize("seed", SEEDS)
def test_edits_keep_the_meaning(seed: int) -> None:
    rng = random.Random(seed)
    model, gm = prepared(seed)
    before = to_text(gm, tensors=True)
    edited = g.clone(gm)
    with g.editing("noise"):
        add_noise(edited, rng)
    g.erase_dead(edited)
    verify(edited)
    assert to_text(edited) != before and to_text(gm, tensors=True) == before
    same_meaning(model, edited)

    # rules undo the noise, and find nothing the second time
    undone = g.clone(edited)
    apply_rules(undone, SIMPLIFY)
    g.erase_dead(undone)
    verify(undone)
    assert diff(before, to_text(undone, tensors=True)) == ""
    assert not apply_rules(undone, SIMPLIFY).modified

    # stopping anywhere is as right as going on
    for fuel in (1, 3):
        partial = g.clone(edited)
        apply_rules(partial, SIMPLIFY, fuel=fuel)
        g.erase_dead(partial)
        verify(partial)
        same_meaning(model, partial, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_of_weights_keep_the_meaning(seed: int) -> None:
    model, gm = prepared(seed)
    edited = g.clone(gm)
    copy_weights(edited, random.Random(seed))
    g.erase_dead(edited)
    verify(edited)
    same_meaning(model, edited)
    same_meaning(model, g.adopt(gm, edited))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_node_keeps_what_it_needs(seed: int) -> None:
    _, gm = prepared(seed)
    add_noise(gm, random.Random(seed))
    g.erase_dead(gm)
    for node in gm.graph.nodes:
        if node.op != "output":
            assert "val" in node.meta
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and g.val(node) is not None:
            fresh = g.fake_call(gm, node.target, node.args, node.kwargs)
            assert torch.utils._pytree.tree_map(_kind, fresh) == torch.utils._pytree.tree_map(_kind, g.val(node))


def _kind(value: Anything) -> Anything:
    return (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else value
