"""Random models, random values and random sizes, to files and back."""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from typing import Any

import pytest
import sympy
import torch
from graph_generator import RandomModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Max, Min, PythonMod
from torch.utils._sympy.value_ranges import ValueRanges

from inc_graph.errors import SavedModelError
from inc_graph.quantization import StaticQuantConfig, load, quantize
from inc_graph.saving.symbols import Symbols, write_symbols
from inc_graph.saving.trees import read_tree, write_tree
from inc_graph.saving.values import decode, encode
from inc_graph.text import to_text


@pytest.mark.slow
@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**16))
def test_random_models(exported: bool, seed: int) -> None:
    model, twin = RandomModel(seed), RandomModel(seed)
    args, kwargs = model.inputs(seed)
    example = {"example_inputs": dict(zip(("image", "vector"), args, strict=True)) | kwargs} if exported else {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            q = quantize(model, StaticQuantConfig(), lambda p: p(*args, **kwargs), **example)
        except ValueError as e:  # nothing in it can be quantized
            assert "can be quantized" in str(e)
            return
        q.save(folder)
        loaded = load(folder, twin)
        for _ in range(2):
            a, b = q(*args, **kwargs), loaded(*args, **kwargs)
            for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        if hasattr(q, "graph"):
            assert to_text(loaded.graph, tensors=True) == to_text(q.graph, tensors=True)


# ------------------------------------------------------------------------------------------------------------- values
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(), st.text(max_size=8),
    st.sampled_from([torch.float32, torch.int8, torch.strided, torch.channels_last, torch.device("cpu")]),
    st.complex_numbers(), st.just(Ellipsis),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=4), st.integers(), st.booleans())
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(KEYS, inner, max_size=4),
        st.tuples(inner, inner, inner).map(lambda t: slice(*t)),
    ),
    max_leaves=12,
)  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, slice):
        return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, complex):
        return same((a.real, a.imag), (b.real, b.imag))
    return a == b or (a != a and b != b)


@given(VALUES)
def test_values(value: Any) -> None:
    assert same(decode(json.loads(json.dumps(encode(value), allow_nan=False))), value)


@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["tuple", "dict", "slice", "node", "float", "complex", "dtype", "device", "layout", "x"]),
        inner, max_size=2),
    max_leaves=8,
))  # fmt: skip
def test_what_is_no_value(data: Any) -> None:
    """Any JSON is a value, or the library's own error."""
    try:
        decode(data)
    except SavedModelError:
        pass


def test_what_cannot_be_saved() -> None:
    for value in (object(), {1, 2}, torch.zeros(1), lambda: 0, type, torch.add):
        with pytest.raises(SavedModelError, match="cannot be saved"):
            encode({"x": [value]})


# -------------------------------------------------------------------------------------------------------------- trees
TREES = st.recursive(
    st.just(0),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=10,
)


@given(TREES)
def test_trees(tree: Any) -> None:
    spec = pytree.tree_flatten(tree)[1]
    again = read_tree(json.loads(json.dumps(write_tree(spec))))
    assert pytree.tree_unflatten(list(range(spec.num_leaves)), again) == pytree.tree_unflatten(
        list(range(spec.num_leaves)), spec
    )


# -------------------------------------------------------------------------------------------------------------- sizes
def expression(rng: random.Random, symbols: list[sympy.Symbol], depth: int) -> Any:
    if depth == 0:
        return rng.choice([*symbols, sympy.Integer(rng.randrange(1, 9))])
    a, b = (expression(rng, symbols, depth - 1) for _ in range(2))
    number = sympy.Integer(rng.randrange(2, 7))
    return rng.choice([a + b, a * b, a - b, FloorDiv(a, number), PythonMod(a, number), Max(a, b), Min(a, b), a**2])


@given(seed=st.integers(0, 2**20), depth=st.integers(0, 4))
@example(seed=162, depth=3)
def test_sizes(seed: int, depth: int) -> None:
    rng = random.Random(seed)
    env = ShapeEnv()
    symbols = []
    add = getattr(env, "add_backed_var_to_val", None) or env.add_var_to_val
    for name in ("s0", "s7"):
        symbols.append(sympy.Symbol(name, positive=True, integer=True))
        env.var_to_range[symbols[-1]] = ValueRanges(2, 100)
        add(symbols[-1], rng.randrange(2, 50))
    value = expression(rng, symbols, depth)
    size = env.create_symintnode(
        value, hint=int(value.subs(dict(getattr(env, "backed_var_to_val", None) or env.var_to_val)))
    )
    if isinstance(size, int):
        return
    table = json.loads(json.dumps(write_symbols([size])))
    again = Symbols(table).integer(str(size.node.expr))
    left, right = (x.node if isinstance(x, torch.SymInt) else None for x in (size, again))
    assert right is None or right.hint == left.hint
    # sympy prints one expression in several ways, so that values are compared and not texts
    for point in (
        {"s0": 2, "s7": 3},
        {"s0": 11, "s7": 5},
        {"s0": 64, "s7": 64},
        {"s0": 3, "s7": 100},
        {"s0": 97, "s7": 2},
    ):
        at = {s: sympy.Integer(point[str(s)]) for s in symbols}
        there = {s: sympy.Integer(point[str(s)]) for s in (right.expr.free_symbols if right else ())}
        assert value.xreplace(at) == (right.expr.xreplace(there) if right else again)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "s0.x", "s0[0]", "9**99999", "s0**s0", "lambda: 0", "[s0]", "s1", "f(s0)", "s0 if s0 else 1",
     "",     "(" * 500, "Max(s0, k=1)", "'a'", "s0 := 3", "Where(1)"],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    table = {"s0": {"low": 2, "high": None, "hint": 3, "positive": True, "integer": True}}
    with pytest.raises(SavedModelError, match="expression of sizes"):
        Symbols(table).expression(text)
