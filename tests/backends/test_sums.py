"""Residual sums: the kernel writes into the memory of its second operand, so that operand must belong to nobody else.

All scales here are powers of two and all zero points even, so that kernel and reference agree to the last bit, and a
value that was overwritten too early cannot hide in a tolerance.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from inc_graph.graph import Fuel, editing
from inc_graph.lowering._onednn import int8_layer_sum
from inc_graph.registry import BACKENDS
from tests.backends.qdq import Builder, Params, calls, layers, lower, run_both

aten = torch.ops.aten

P = Params(2.0**-3, 128)
CHANNELS, SIDE = 4, 5


class Net(Builder):
    """Graphs of layers whose values all have the shape [2, 4, 5, 5] ("conv") or [6, 4] ("linear")."""

    def __init__(self, kind: str = "conv") -> None:
        super().__init__()
        self.kind, self.made = kind, 0

    def source(self, seed: int = 0) -> tuple[Tensor, fx.Node]:
        shape = (2, CHANNELS, SIDE, SIDE) if self.kind == "conv" else (6, CHANNELS)
        x = torch.randint(-40, 41, shape, generator=torch.Generator().manual_seed(seed)) * P.scale
        return x, self.act(self.input(x), P)

    def layer(self, x: fx.Node) -> fx.Node:
        """A layer with a weight of small multiples of 1/8, not yet quantized."""
        self.made += 1
        shape = (CHANNELS, CHANNELS, 3, 3) if self.kind == "conv" else (CHANNELS, CHANNELS)
        w = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(self.made)) / 8.0
        codes = self.const((w * 8).to(torch.int8), "weight_q")
        scale = self.const(torch.full([CHANNELS] + [1] * (w.ndim - 1), 0.125), "weight_scale")
        block = [1] + [-1] * (w.ndim - 1)
        dq = self.call(torch.ops.inc.dequantize.default, codes, scale, None, block, "int8", torch.float32)
        if self.kind == "linear":
            return self.call(aten.linear.default, x, dq, None)
        return self.call(aten.conv2d.default, x, dq, None, [1, 1], [1, 1])

    def block(self, x: fx.Node, other: fx.Node, relu: bool = False) -> fx.Node:
        """act(layer(x) + other)"""
        y = self.call(aten.add.Tensor, self.layer(x), other)
        return self.act(self.call(aten.relu.default, y) if relu else y, P)

    def plain(self, x: fx.Node) -> fx.Node:
        return self.act(self.call(aten.relu.default, self.layer(x)), P)


def same(net: Net, inputs: list[Tensor], *outputs: fx.Node) -> Any:
    gm = net.done(*outputs)
    lowered = lower(gm)
    for i, (expected, got) in enumerate(run_both(gm, lowered, *inputs)):
        assert torch.equal(expected, got), f"output {i}"
    return lowered


def sums(lowered: Any) -> int:
    return calls(lowered).count("int8_layer_sum")


def copies(lowered: Any) -> int:
    return calls(lowered).count("aten.clone.default")


KINDS = pytest.mark.parametrize("kind", ["conv", "linear"])


@KINDS
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_residual_is_summed_in_the_kernel_without_a_copy(kind: str, relu: bool, swapped: bool) -> None:
    net = Net(kind)
    x, a = net.source()
    b = net.plain(a)
    y = net.layer(net.plain(b))
    y = net.call(aten.add.Tensor, *((b, y) if swapped else (y, b)))
    y = net.act(net.call(aten.relu.default, y) if relu else y, Params(P.scale, 100))
    lowered = same(net, [x], y)
    assert (sums(lowered), copies(lowered)) == (1, 0)
    assert layers(lowered)[-1].activation.name == ("relu" if relu else "none")
    assert list(lowered.report.absorbed) == ["add_tensor"] and "aten.add.Tensor" not in calls(lowered)


def test_a_chain_of_residual_blocks_needs_no_copy() -> None:
    net = Net()
    x, v = net.source()
    v = net.plain(v)
    for _ in range(3):
        v = net.block(net.plain(net.plain(v)), v, relu=True)
    lowered = same(net, [x], v)
    assert (sums(lowered), copies(lowered)) == (3, 0)


def _later(net: Net, b: fx.Node) -> list[fx.Node]:
    return [net.block(net.plain(b), b), net.plain(b)]


def _output(net: Net, b: fx.Node) -> list[fx.Node]:
    return [net.block(net.plain(b), b), b]


def _itself(net: Net, b: fx.Node) -> list[fx.Node]:
    return [net.block(b, b)]


def _viewed_later(net: Net, b: fx.Node) -> list[fx.Node]:
    view = net.act(net.call(aten.permute.default, b, [0, 1, 3, 2]), P)
    return [net.block(net.plain(b), b), net.plain(view)]


def _seen_through_a_view(net: Net, b: fx.Node) -> list[fx.Node]:
    view = net.act(net.call(aten.permute.default, b, [0, 1, 3, 2]), P)
    return [net.block(net.plain(view), view), net.plain(b)]


def _shared_by_two_branches(net: Net, b: fx.Node) -> list[fx.Node]:
    return [net.block(net.plain(b), b), net.block(net.plain(b), b, relu=True)]


def _used_twice(net: Net, b: fx.Node) -> list[fx.Node]:
    first = net.block(net.plain(b), b)
    return [net.block(net.plain(first), b)]


def _summed_after_the_sum(net: Net, b: fx.Node) -> list[fx.Node]:
    """The first sum's memory is the second's operand, and the second's input is read after the first."""
    first = net.block(net.plain(b), b)
    second = net.block(net.plain(first), first)
    return [net.block(net.plain(second), first), second]


def _read_by_a_float_operator(net: Net, b: fx.Node) -> list[fx.Node]:
    first = net.block(net.plain(b), b)
    return [first, net.call(aten.sigmoid.default, b)]


def _padded_later(net: Net, b: fx.Node) -> list[fx.Node]:
    """The pad is absorbed by a convolution that runs after the sum."""
    pad = net.act(net.call(aten.pad.default, b, [1, 0, 1, 0]), P)
    first = net.block(net.plain(b), b)
    return [first, net.plain(pad)]


def _pooled(net: Net, b: fx.Node) -> list[fx.Node]:
    pool = net.act(net.call(aten.max_pool2d.default, b, [3, 3], [1, 1], [1, 1]), P)
    return [net.block(net.plain(pool), pool), net.plain(b)]


HAZARDS: dict[Callable[[Net, fx.Node], list[fx.Node]], int] = {
    _later: 1,
    _output: 1,
    _itself: 1,
    _viewed_later: 1,
    _seen_through_a_view: 1,
    _shared_by_two_branches: 1,  # the last one may have the memory
    _used_twice: 1,
    _summed_after_the_sum: 2,
    _read_by_a_float_operator: 1,
    _padded_later: 1,
    _pooled: 0,
}


@pytest.mark.parametrize("case", HAZARDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("produced", [True, False], ids=["by a layer", "by quantize"])
def test_memory_that_somebody_still_reads_is_copied(case: Any, produced: bool) -> None:
    net = Net()
    x, v = net.source()
    lowered = same(net, [x], *case(net, net.plain(v) if produced else v))
    assert sums(lowered) == calls(lowered).count("int8_layer_sum") >= 1
    assert copies(lowered) <= HAZARDS[case]


def test_two_quantized_convolutions_are_added_in_the_later_one() -> None:
    """The downsampling block of ResNet."""
    net = Net()
    x, v = net.source()
    short = net.act(net.layer(v), P)
    y = net.call(aten.add.Tensor, net.layer(net.plain(v)), short)
    lowered = same(net, [x], net.act(net.call(aten.relu.default, y), P))
    assert (sums(lowered), copies(lowered)) == (1, 0)


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs_of_sums(seed: int) -> None:
    """Branches, residuals, views and pools in any order: always the reference, bit for bit."""
    rng = random.Random(seed)
    net = Net()
    x, first = net.source(seed)
    values = [first]
    for _ in range(rng.randint(3, 9)):
        a, b = rng.choice(values[-4:]), rng.choice(values)
        step = rng.choice(["block", "block", "block", "plain", "view", "pool", "add", "float"])
        if step == "block":
            values.append(net.block(a, b, rng.random() < 0.5))
        elif step == "plain":
            values.append(net.plain(a))
        elif step == "view":
            values.append(net.act(net.call(aten.permute.default, a, [0, 1, 3, 2]), P))
        elif step == "pool":
            values.append(net.act(net.call(aten.max_pool2d.default, a, [3, 3], [1, 1], [1, 1]), P))
        elif step == "add":
            values.append(net.act(net.call(aten.add.Tensor, a, b), P))
        else:
            values.append(net.act(net.call(aten.mul.Tensor, a, 0.5), P))
    same(net, [x], values[-1], *rng.sample(values, min(len(values), rng.randint(0, 2))))


@pytest.mark.parametrize("fuel", range(12))
def test_every_prefix_of_the_rewrites_is_correct(fuel: int) -> None:
    """Lowering can be bisected: stopped after any rewrite, the graph means the same."""
    net = Net()
    x, v = net.source()
    y = net.block(net.plain(v), v, relu=True)
    gm = net.done(net.block(net.act(net.call(aten.max_pool2d.default, y, [3, 3], [1, 1], [1, 1]), P), y))
    with editing("lower", Fuel(fuel)):
        lowered = BACKENDS.get("inductor").lower(gm)
    assert sum(lowered.report.claimed.values()) <= fuel
    assert torch.equal(gm(x)[0], lowered.graph(x)[0])


# ---------------------------------------------------------------------------------------------------- what is no sum
def _one(make: Callable[[Net, fx.Node, fx.Node], fx.Node], kind: str = "conv") -> Any:
    net = Net(kind)
    x, v = net.source()
    b = net.plain(v)
    return same(net, [x], make(net, net.layer(v), b))


@KINDS
def test_other_additions_are_computed_and_not_fused(kind: str) -> None:
    cases = (
        lambda n, y, b: n.act(n.call(aten.add.Tensor, y, y), P),
        lambda n, y, b: n.act(n.call(aten.add.Tensor, y, b, alpha=2), P),
        lambda n, y, b: n.act(n.call(aten.add.Tensor, y, 0.5), P),
        lambda n, y, b: n.act(n.call(aten.add.Tensor, y, n.call(aten.slice.Tensor, b, -1, 0, 1)), P),
        lambda n, y, b: n.act(n.call(aten.add.Tensor, n.call(aten.slice.Tensor, y, -1, 0, 1), b), P),
    )
    for case in cases:
        lowered = _one(case, kind)
        assert sums(lowered) == 0 and "aten.add.Tensor" in calls(lowered)
        if "add_tensor" in lowered.report.missed:
            assert "not stand behind a quantized layer" in lowered.report.missed["add_tensor"][1]


def test_alpha_1_is_an_ordinary_sum() -> None:
    assert sums(_one(lambda n, y, b: n.act(n.call(aten.add.Tensor, y, b, alpha=1), P))) == 1


def test_a_sum_whose_result_is_float_stays_an_addition_for_convolutions() -> None:
    lowered = _one(lambda n, y, b: n.call(aten.add.Tensor, y, b))
    assert sums(lowered) == 0 and "aten.add.Tensor" in calls(lowered)


def test_a_sum_into_another_dtype_or_seven_bits_stays_an_addition() -> None:
    for p in (Params(P.scale, 64, "uint7"), Params(P.scale, 0, "int7")):
        assert sums(_one(lambda n, y, b, p=p: n.act(n.call(aten.add.Tensor, y, b), p))) == 0


@pytest.mark.parametrize("target, bounds, fused", [
    (aten.relu6.default, (), False),  # 6 is code 176: saturation does not clip there
    (aten.hardtanh.default, (0.0, 15.875), True),
    (aten.hardtanh.default, (-16.0, 15.875), True),
    (aten.hardtanh.default, (-1.0, 15.875), False),
    (aten.silu.default, (), False),
])  # fmt: skip
def test_what_may_stand_between_a_sum_and_its_quantization(target: Any, bounds: Any, fused: bool) -> None:
    net = Net()
    x, v = net.source()
    y = net.call(aten.add.Tensor, net.layer(v), net.plain(v))
    gm = net.done(net.act(net.call(target, y, *bounds), P))
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, x)
    assert (expected - got).abs().max() <= (0 if fused else P.scale)
    assert sums(lowered) == fused


def test_one_dimensional_convolutions_sum_too_and_three_dimensional_ones_do_not() -> None:
    for dims, op in ((1, aten.conv1d.default), (3, aten.conv3d.default)):
        b = Builder()
        x = torch.randint(-20, 20, (2, 3, *[4] * dims)) * P.scale
        v = b.act(b.input(x), P)
        w = b.weight(torch.randn(3, 3, *[1] * dims))
        gm = b.done(b.act(b.call(aten.add.Tensor, b.call(op, v, w), v), P))
        lowered = lower(gm)
        ((expected, got),) = run_both(gm, lowered, x)
        assert (expected - got).abs().max() <= P.scale
        assert sums(lowered) == (dims == 1)


# --------------------------------------------------------------------------------------------- float operands, linear
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("out", ["float", "codes"])
@pytest.mark.parametrize("layout", ["dense", "transposed", "sliced", "expanded"])
def test_a_linear_layer_adds_a_float_operand_of_any_layout(relu: bool, out: str, layout: str) -> None:
    make = {
        "dense": lambda: torch.randn(2, 6, CHANNELS),
        "transposed": lambda: torch.randn(CHANNELS, 6, 2).permute(2, 1, 0),
        "sliced": lambda: torch.randn(2, 6, 2 * CHANNELS)[..., ::2],
        "expanded": lambda: torch.randn(1, 6, CHANNELS).expand(2, 6, CHANNELS),
    }
    other = (make[layout]() * 8).round() / 8
    net = Net("linear")
    x = torch.randint(-40, 41, (2, 6, CHANNELS)) * P.scale
    v, o = net.act(net.input(x), P), net.input(torch.empty_strided(other.shape, other.stride()))
    y = net.call(aten.add.Tensor, o, net.layer(v))
    y = net.call(aten.relu.default, y) if relu else y
    lowered = same(net, [other, x], y if out == "float" else net.act(y, P))  # placeholders come first in, last out
    assert calls(lowered).count("int8_layer_add") == 1 and "aten.add.Tensor" not in calls(lowered)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_float_operand_of_another_dtype_is_not_fused(dtype: torch.dtype) -> None:
    net = Net("linear")
    _, v = net.source()
    y = net.call(aten.add.Tensor, net.layer(v), net.input(torch.ones(6, CHANNELS, dtype=dtype)))
    gm = net.done(y)
    assert "aten.add.Tensor" in calls(lower(gm))


# ---------------------------------------------------------------------------------------------------------- the kernel
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_the_sum_is_in_place_and_copies_only_another_layout(dims: int) -> None:
    layer = layers(lower(_doubled(dims)))[-1]
    codes = torch.full((2, 4, *[3] * dims), 130, dtype=torch.uint8)
    right = layer.empty_out(codes).fill_(131)
    out = int8_layer_sum(codes, right, layer)
    assert out.data_ptr() == right.data_ptr() and torch.equal(out, torch.full_like(out, 133))
    if dims:
        other = torch.full((2, 4, *[3] * dims), 131, dtype=torch.uint8)
        out = int8_layer_sum(codes, other, layer)
        assert torch.equal(out, torch.full_like(out, 133)) and bool((other == 131).all())


def _doubled(dims: int) -> fx.GraphModule:
    b = Builder()
    v = b.act(b.input(torch.zeros(2, 4, *[3] * dims)), P)
    op = {0: aten.linear.default, 1: aten.conv1d.default, 2: aten.conv2d.default}[dims]
    w = torch.eye(4).reshape(4, 4, *[1] * dims)
    y = b.act(b.call(op, v, b.weight(w)), P)
    return b.done(b.act(b.call(aten.add.Tensor, b.call(op, v, b.weight(w)), y), P))
