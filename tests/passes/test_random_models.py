"""The passes on random models: float passes change nothing, quantization little, and nothing at all of the user's.

The bound of 20 dB: eight bits over a range that was just measured leave 35 to 50 dB after one layer, and the noise of
ten steps adds up to some 10 dB. A lost bias, a wrong axis or a wrong scale leaves less than 15. Models that choose a
row of a table by argmax are left out of the bound: there the least rounding can choose another row.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from inc_graph.errors import ConfigError
from inc_graph.graph import clone, mutated_attrs
from inc_graph.ops import is_dequantize, is_quantize
from inc_graph.recipe import OpQuant, Recipe
from inc_graph.spec import PerChannel, QSpec
from inc_graph.text import to_text
from inc_graph.verify import verify
from tests.graph_generator import KINDS, RandomModel
from tests.passes.pipelines import (
    CORRECTED,
    FLOAT,
    INT8,
    S8,
    WEIGHT_ONLY,
    bits,
    captured,
    check_pairs,
    float_twin,
    kind,
    name,
    pairs,
    quantize,
    recipe,
    run,
    same_bits,
    sqnr,
)

SMOOTH = tuple(k for k in KINDS if k != "embed")
FP8 = OpQuant(QSpec("fp8_e4m3"), QSpec("fp8_e4m3", "symmetric", PerChannel(0)))
CHOICES = (INT8, CORRECTED, replace(INT8, activation=S8, weight_algorithm="mse"), FP8, WEIGHT_ONLY, None)
TYPES = ("linear", "conv2d", "add", "mul", "embedding", "avg_pool", "cat", "reshape", "max_pool")


def mixed(seed: int, size: int) -> Recipe:
    """Rules of all kinds and formats, for the eager backend or one with few kernels."""
    rng = random.Random(seed)
    local = [kind(k, rng.choice(CHOICES)) for k in rng.sample(TYPES, 4)]
    local += [name(rf"layers\.{i}(\.|$)", rng.choice(CHOICES)) for i in rng.sample(range(size), size // 4)]
    supported = rng.choice([None, ("linear", "conv2d", "add", "embedding")])
    return recipe(*local, everything=rng.choice([INT8, CORRECTED, FP8]), supported=supported)


@pytest.mark.parametrize("seed", range(12))
def test_float_passes_change_nothing(seed: int) -> None:
    model = RandomModel(seed)
    args, kwargs = model.inputs(seed)
    unchanged = bits(model)
    with torch.no_grad():
        before, after = captured(model, *args, **kwargs), float_twin(model, *args, **kwargs)
        for _ in range(2):  # twice: written buffers carry state from call to call
            want, got = before(*args, **kwargs), after(*args, **kwargs)
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-4)
    text = to_text(after, tensors=True)
    assert not any(r.matched for r in run(after, FLOAT).reports)
    assert to_text(after, tensors=True) == text and unchanged()


@pytest.mark.parametrize("seed", range(16))
def test_quantized(seed: int) -> None:
    model = RandomModel(seed, kinds=SMOOTH)
    args, kwargs = model.inputs(seed)
    unchanged = bits(model)
    q = quantize(model, *args, plan=recipe(everything=CORRECTED if seed % 2 else INT8), **kwargs)
    check(q)
    twin = float_twin(model, *args, **kwargs)
    with torch.no_grad():
        twin(*args, **kwargs)  # the quantized graph has run once too, to calibrate
        assert sqnr(twin(*args, **kwargs), q(*args, **kwargs)) > 20
    assert unchanged()


@pytest.mark.filterwarnings("ignore::inc_graph.errors.UnusedRuleWarning")
@pytest.mark.parametrize("seed", range(12))
def test_mixed_formats(seed: int) -> None:
    model = RandomModel(seed + 100, size=20)
    args, kwargs = model.inputs(seed)
    unchanged = bits(model)
    try:
        q = quantize(model, *args, plan=mixed(seed, 20), **kwargs)
    except ConfigError as e:  # a weight-only rule names what has no weight to quantize: said, and nothing changed
        assert "this operator cannot be quantized" in str(e) and unchanged()
        return
    check(q)
    with torch.no_grad():
        first = clone(q)(*args, **kwargs)
        assert all(torch.isfinite(t).all() for t in first.values())
    assert unchanged()


def test_the_models_do_quantize() -> None:
    """The tests above would pass on graphs in which nothing is quantized."""
    found = []
    for seed in range(6):
        model = RandomModel(seed, kinds=SMOOTH)
        args, kwargs = model.inputs(seed)
        found.append(sum(1 for _ in pairs(quantize(model, *args, **kwargs))))
    assert sum(found) > 15 and max(found) > 4


@pytest.mark.parametrize("seed", [1, 3])
def test_the_same_model_gives_the_same_graph(seed: int) -> None:
    made = []
    for _ in range(2):
        model = RandomModel(seed, kinds=SMOOTH)
        args, kwargs = model.inputs(seed)
        made.append(quantize(model, *args, plan=recipe(everything=CORRECTED), **kwargs))
    assert to_text(made[0], tensors=True) == to_text(made[1], tensors=True)
    with torch.no_grad():
        assert same_bits(made[0](*args, **kwargs), made[1](*args, **kwargs))


def check(q: Any) -> None:
    verify(q, "qdq")
    check_pairs(q)
    written = mutated_attrs(q)
    for node in q.graph.nodes:
        if is_quantize(node) or is_dequantize(node):
            source = node.args[0]
            assert source.op != "get_attr" or source.target not in written
            assert node.op == "call_function" and (is_dequantize(node) or source.meta["val"].is_floating_point())
