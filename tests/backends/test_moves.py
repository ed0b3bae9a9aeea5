"""Operators that move values run on codes, exactly; what does not take integers stays float."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inc_graph.lowering._codes import max_pool
from inc_graph.lowering._moves import MOVES
from tests.backends.qdq import Builder, Params, calls, lower, run_both

aten = torch.ops.aten

MOVED: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = [
    (aten.view.default, (2, 8, 6), ([2, 48],)),
    (aten.reshape.default, (2, 8, 6), ([-1, 6],)),
    (aten._unsafe_view.default, (2, 8, 6), ([16, 6],)),
    (aten.flatten.using_ints, (2, 8, 6), (1,)),
    (aten.unflatten.int, (2, 8, 6), (1, [2, 4])),
    (aten.permute.default, (2, 8, 6), ([2, 0, 1],)),
    (aten.transpose.int, (2, 8, 6), (1, 2)),
    (aten.t.default, (8, 6), ()),
    (aten.movedim.int, (2, 8, 6), (0, 2)),
    (aten.squeeze.default, (2, 1, 6), ()),
    (aten.squeeze.dim, (2, 1, 6), (1,)),
    (aten.squeeze.dims, (2, 1, 6), ([1],)),
    (aten.unsqueeze.default, (2, 6), (1,)),
    (aten.expand.default, (2, 1, 6), ([2, 5, 6],)),
    (aten.contiguous.default, (2, 6), ()),
    (aten.clone.default, (2, 6), ()),
    (aten.alias.default, (2, 6), ()),
    (aten.detach.default, (2, 6), ()),
    (aten.slice.Tensor, (2, 8, 6), (1, 1, 7, 2)),
    (aten.select.int, (2, 8, 6), (1, 3)),
    (aten.narrow.default, (2, 8, 6), (1, 3, 2)),
    (aten.flip.default, (2, 8, 6), ([0, 2],)),
    (aten.roll.default, (2, 8, 6), ([3], [1])),
    (aten.repeat.default, (2, 6), ([1, 3, 2],)),
    (aten.tile.default, (2, 6), ([2, 1, 3],)),
    (aten.repeat_interleave.self_int, (2, 8, 6), (3, 1)),
    (aten.pixel_shuffle.default, (2, 8, 3, 3), (2,)),
    (aten.pixel_unshuffle.default, (2, 2, 4, 6), (2,)),
    (aten.channel_shuffle.default, (2, 8, 3, 3), (4,)),
    (aten.pad.default, (2, 8, 6), ([1, 2],)),
    (aten.pad.default, (2, 8, 6), ([1, 2, 0, -1], "constant", 0.0)),
    (aten.pad.default, (2, 8, 6), ([1, 2], "reflect")),
    (aten.pad.default, (2, 3, 5, 6), ([1, 2, 0, 1], "replicate")),
    (aten.pad.default, (2, 3, 5, 6), ([1, 2, 0, 1], "circular")),
    (aten.max_pool1d.default, (2, 8, 9), ([3], [2], [1])),
    (aten.max_pool1d.default, (2, 8, 9), ([2], [], [0], [2], True)),
    (aten.max_pool1d.default, (8, 9), ([3], [1])),
    (aten.max_pool2d.default, (2, 8, 9, 7), ([3, 2], [2, 2], [1, 1])),
    (aten.max_pool2d.default, (2, 8, 9, 7), ([2], [], [0], [2], True)),
    (aten.max_pool3d.default, (2, 4, 5, 6, 7), ([2, 3, 2], [2, 1, 2], [1, 1, 0])),
]
UNSIGNED: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = [
    (aten.upsample_nearest1d.vec, (2, 8, 5), (None, [2.0])),
    (aten.upsample_nearest2d.vec, (2, 8, 5, 4), (None, [2.0, 3.0])),
    (aten.upsample_nearest2d.vec, (2, 8, 5, 4), ([7, 9], None)),
    (aten.upsample_nearest3d.vec, (2, 4, 3, 2, 4), (None, [2.0, 1.0, 2.0])),
]
JOINS: dict[Any, tuple[int, ...]] = {
    aten.cat.default: (1,), aten.stack.default: (1,), aten.hstack.default: (), aten.vstack.default: (),
    aten.dstack.default: (),
}  # fmt: skip
INDEXED: dict[Any, Any] = {
    aten.index_select.default: lambda x, i: (x, 1, i),
    aten.index.Tensor: lambda x, i: (x, [None, i]),
    aten.gather.default: lambda x, i: (x, 0, i),
}
FORMATS = [Params(0.05, 100), Params(0.05, -7, "int8"), Params(0.05, 60, "uint7"), Params(0.05, 11, "int7")]


def name(case: Any) -> str:
    return f"{case[0]}-{'-'.join(map(str, case[2]))}" if isinstance(case, tuple) else str(case)


@pytest.mark.parametrize("p", FORMATS, ids=lambda p: p.qtype)
@pytest.mark.parametrize("case", MOVED + UNSIGNED, ids=name)
def test_a_move_runs_on_codes(case: Any, p: Params) -> None:
    op, shape, args = case
    b = Builder()
    x = p.values(*shape)
    gm = b.done(b.act(b.call(op, b.act(b.input(x), p), *args), p))
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, x)
    assert torch.equal(expected, got)
    if op in (c[0] for c in UNSIGNED) and p.qtype == "int7":
        assert "does not take torch.int8" in next(iter(lowered.report.missed.values()))[1]
        return
    inside = calls(lowered)[1:-1]
    assert lowered.report.claimed["move"] == 1 and not any("quantize" in c for c in inside)
    assert inside == ["max_pool" if "max_pool" in str(op) else str(op)] or op is aten.contiguous.default
    assert not lowered.report.kernels  # moving is no computing


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    "kernel,stride,padding,dilation", [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 2), (5, 3, 2, 1), (2, 3, 1, 1)]
)
def test_max_pool_on_large_channels_last_maps(
    kernel: int, stride: int, padding: int, dilation: int, ceil: bool
) -> None:
    """torch's kernel refuses channels-last uint8 maps of more than 255 places."""
    for dims, size in ((1, (2, 3, 300)), (2, (2, 3, 33, 20)), (3, (1, 2, 9, 8, 7))):
        x = torch.randint(0, 256, size, dtype=torch.uint8)
        if dims == 2:
            x = x.contiguous(memory_format=torch.channels_last)
        args = ([kernel] * dims, [stride] * dims, [padding] * dims, [dilation] * dims, ceil)
        pool = getattr(torch.nn.functional, f"max_pool{dims}d")
        expected = pool(x.float(), kernel, stride, padding, dilation, ceil)
        assert torch.equal(max_pool(x, *args).float(), expected)


def test_all_moves_are_tested() -> None:
    tested = {c[0] for c in MOVED + UNSIGNED} | {*JOINS, *INDEXED}
    assert tested == set(MOVES)


@pytest.mark.parametrize("channels_last", [False, True])
def test_moves_take_channels_last_codes(channels_last: bool) -> None:
    p = Params(0.05, 100)
    for op, shape, args in MOVED + UNSIGNED:
        if len(shape) != 4 or op in (aten.view.default, aten._unsafe_view.default):
            continue
        x = p.values(*shape)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        b = Builder()
        gm = b.done(b.act(b.call(op, b.act(b.input(x), p), *args), p))
        ((expected, got),) = run_both(gm, lower(gm), x)
        assert torch.equal(expected, got), op


@pytest.mark.parametrize("op", JOINS, ids=str)
def test_several_inputs_with_one_scale_are_joined_as_codes(op: Any) -> None:
    b, p = Builder(), Params(0.05, 100)
    x, y = p.values(2, 3, 4), p.values(2, 3, 4, seed=1)
    second = b.act(b.input(y), p)
    first = b.act(b.input(x), p)
    gm = b.done(b.act(b.call(op, [first, second, first], *JOINS[op]), p))
    lowered = lower(gm)
    assert torch.equal(*run_both(gm, lowered, x, y)[0])
    assert calls(lowered) == ["quantize_codes", "quantize_codes", str(op), "dequantize_codes"]


@pytest.mark.parametrize("op", INDEXED, ids=str)
def test_entries_picked_by_an_index(op: Any) -> None:
    b, p = Builder(), Params(0.05, 100)
    x = p.values(2, 6, 4)
    index = torch.tensor([[[1, 0, 1, 0]] * 3]) if op is aten.gather.default else torch.tensor([4, 0, 0])
    i = b.input(index)
    gm = b.done(b.act(b.call(op, *INDEXED[op](b.act(b.input(x), p), i)), p))
    lowered = lower(gm)
    assert torch.equal(*run_both(gm, lowered, x, index)[0]) and lowered.report.claimed["move"] == 1


def test_a_chain_of_moves() -> None:
    b, p = Builder(), Params(0.05, 100)
    x = p.values(2, 8, 6, 6)
    v = b.act(b.input(x), p)
    for op, args in (
        (aten.max_pool2d.default, ([2, 2],)),
        (aten.pad.default, ([1, 1],)),
        (aten.permute.default, ([0, 2, 3, 1],)),
        (aten.reshape.default, ([2, -1],)),
    ):
        v = b.act(b.call(op, v, *args), p)
    gm = b.done(v)
    lowered = lower(gm)
    assert torch.equal(*run_both(gm, lowered, x)[0])
    assert lowered.report.claimed == {"move": 4, "quantize": 1, "dequantize": 1}


# --------------------------------------------------------------------------------------------------------- not moved
def test_padding_with_another_value_stays_float() -> None:
    b, p = Builder(), Params(0.05, 100)
    x = p.values(2, 6)
    gm = b.done(b.act(b.call(aten.pad.default, b.act(b.input(x), p), [1, 1], "constant", 0.1), p))
    lowered = lower(gm)
    assert torch.equal(*run_both(gm, lowered, x)[0])
    assert [r for _, r in lowered.report.missed.values()] == ["padding with another value than zero"]


def test_two_scales_are_a_requantization_and_no_move() -> None:
    b = Builder()
    x = Params(0.05, 100).values(2, 6)
    v = b.act(b.input(x), Params(0.05, 100))
    gm = b.done(b.act(b.call(aten.t.default, v), Params(0.06, 100)))
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, x)
    assert (expected - got).abs().max() <= 0.061
    assert "do not share one static 8-bit scale" in next(iter(lowered.report.missed.values()))[1]


def test_a_float_reader_keeps_the_move_float() -> None:
    b, p = Builder(), Params(0.05, 100)
    x = p.values(2, 6)
    y = b.call(aten.t.default, b.act(b.input(x), p))
    gm = b.done(b.act(y, p), b.call(aten.sin.default, y))
    lowered = lower(gm)
    assert all(torch.equal(*pair) for pair in run_both(gm, lowered, x))
    assert lowered.report.claimed["move"] == 0


@pytest.mark.parametrize("op, args", [(aten.avg_pool2d.default, ([2, 2],)), (aten.mean.dim, ([2, 3], True)),
                                      (aten.mul.Tensor, (2.0,))])  # fmt: skip
def test_operators_that_compute_are_not_moved(op: Any, args: Any) -> None:
    b, p = Builder(), Params(0.05, 100)
    x = p.values(2, 3, 4, 4)
    gm = b.done(b.act(b.call(op, b.act(b.input(x), p), *args), p))
    lowered = lower(gm)
    ((expected, got),) = run_both(gm, lowered, x)
    assert (expected - got).abs().max() <= p.scale * 1.01
    assert calls(lowered) == ["quantize_codes", "dequantize_codes", str(op), "quantize_codes", "dequantize_codes"]
    ((_, reason),) = lowered.report.missed.values()
    assert reason.startswith("backend 'inductor' has no quantized kernel for")
