"""A weight that several layers read is packed once, whatever their scales, shapes and geometries; its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inc_graph.lowering._onednn import Int8Layer, Output
from inc_graph.lowering._packed import Geometry, PackedWeight
from inc_graph.ops import DEQUANTIZE
from inc_graph.quantization import StaticQuantConfig, quantize
from tests.backends.qdq import Builder, Params, assert_close, layers, lower, run_both

aten = torch.ops.aten


class Albert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(256, 256), nn.LayerNorm(256)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = self.norm(x + F.gelu(self.layer(x)))
        return x


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.head = nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for _ in range(3):
            maps.append(self.head(x))
            x = F.relu(self.down(x))
        return maps


def quantized(model: nn.Module, *x: Tensor, backend: str = "inductor") -> Any:
    config = StaticQuantConfig(bias_correction=False)
    return quantize(model.eval(), config, run_fn=lambda p: p(*x), example_inputs=x, backend=backend)


def share(q: Any) -> float:
    return float(q.report.bytes_after / q.report.bytes_before)


def flat(out: Any) -> Tensor:
    return torch.cat([y.flatten() for y in (out if isinstance(out, list | tuple) else [out])])


# ------------------------------------------------------------------------------------------------------ whole models
@pytest.mark.parametrize("model, shape, count, weights", [(Albert(), (4, 256), 6, 1), (Head(), (2, 64, 24, 24), 5, 2)])
def test_a_layer_that_is_called_often_is_kept_once(
    model: nn.Module, shape: tuple[int, ...], count: int, weights: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantized(model, x)
    assert len(q.report.kernels) == count and share(q) < 0.3
    found = [v for v in vars(q.lowered).values() if isinstance(v, Int8Layer)]
    assert len(found) == count and len({id(layer.weight) for layer in found}) == weights
    assert len({layer._head[:2] for layer in found}) > weights  # every call has an input scale of its own
    reference = quantized(model, x, backend="eager")
    with torch.no_grad():
        expected, got = flat(reference(x)), flat(q(x))
    assert (expected - got).norm() < 0.02 * expected.norm()
    codes = {n: b for n, b in q.graph.named_buffers() if b.dtype == torch.int8}
    assert len(codes) == weights
    assert all(torch.equal(b, reference.graph.get_buffer(n)) for n, b in codes.items())


def test_a_table_tied_to_a_head_is_kept_in_two_forms() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(2000, 64), nn.Linear(64, 2000, bias=False)
            self.head.weight = self.table.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.table(i))

    q = quantized(Tied(), torch.randint(0, 2000, (4, 7)))
    assert len(q.report.kernels) == 2 and 0.5 <= share(q) < 0.6


def test_narrow_groups_do_not_grow_above_float() -> None:
    torch.manual_seed(0)
    conv = lambda out, groups: nn.Conv2d(64, out, 3, padding=1, groups=groups, bias=False)  # noqa: E731
    model = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 32), nn.ReLU(), conv(128, 64))
    x = torch.randn(2, 64, 12, 12)
    q = quantized(model, x)
    assert len(q.report.kernels) == 3 and share(q) < 1
    expected, got = quantized(model, x, backend="eager")(x), q(x)
    assert (expected - got).norm() < 0.02 * expected.norm()


# --------------------------------------------------------------------------------------------- graphs written by hand
def shared(
    *geometries: tuple[Any, ...], op: Any = aten.conv2d.default, shape: tuple[int, ...] = (8, 8, 3, 3)
) -> set[int]:
    """Packed weights of layers that read one weight, with several geometries and inputs; their outputs are checked."""
    b = Builder()  # it puts each input before the earlier ones
    w = b.weight(torch.randn(shape, generator=torch.Generator().manual_seed(1)), block=[-1] * len(shape))
    xs, nodes = [], []
    for i, geometry in enumerate(geometries):
        p = Params(0.02 * (i + 1), (0, 100, 7)[i % 3])
        xs.append(p.values(2, 8, 9 + i, 9, seed=i))
        nodes.append(b.call(op, b.act(b.input(xs[-1]), p), w, None, *geometry))
    gm = b.done(*nodes)
    lowered = lower(gm)
    assert len(layers(lowered)) == len(geometries)
    for expected, got in run_both(gm, lowered, *xs[::-1]):
        assert_close(expected, got)
    ((attr, codes),) = lowered.packed.items()
    assert torch.equal(codes(), getattr(gm, attr))
    return {id(layer.weight) for layer in layers(lowered)}


def test_convolutions_of_any_stride_padding_and_dilation_share() -> None:
    one, two, wide = ([1, 1], [1, 1], [1, 1], 1), ([2, 2], [0, 1], [1, 1], 1), ([1, 1], [3, 3], [3, 3], 1)
    assert len(shared(one, two, wide)) == 1


def test_what_is_packed_in_another_form_is_not_shared() -> None:
    plain, even = ([1, 1], "valid", [1, 1], 1), ([1, 1], "same", [1, 1], 1)
    word = aten.conv2d.padding
    assert len(shared(plain, even, plain, op=word)) == 1  # an odd kernel needs no taps
    assert len(shared(plain, even, plain, even, op=word, shape=(8, 8, 2, 2))) == 2


def test_transposed_convolutions_share() -> None:
    a, b = ([1, 1], [0, 0], [0, 0], 1, [1, 1]), ([2, 2], [1, 1], [0, 0], 1, [1, 1])
    assert len(shared(a, b, op=aten.conv_transpose2d.input)) == 1


def test_codes_with_two_scales_are_two_weights() -> None:
    b, p = Builder(), Params(0.02, 100)
    w = b.weight(torch.randn(8, 8))
    twice = b.const(2 * torch.ones(8, 1), "weight_scale")
    other = b.call(DEQUANTIZE, w.args[0], twice, *w.args[2:])
    x = p.values(4, 8)
    v = b.act(b.input(x), p)
    gm = b.done(b.call(aten.linear.default, v, w, None), b.call(aten.linear.default, v, other, None))
    lowered = lower(gm)
    for expected, got in run_both(gm, lowered, x):
        assert_close(expected, got)
    assert len({id(layer.weight) for layer in layers(lowered)}) == 2


def test_the_weight_is_packed_for_a_zero_point_if_any_reader_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made, init = [], PackedWeight.__init__
    monkeypatch.setattr(PackedWeight, "__init__", lambda self, *a: (made.append(a[-1]), init(self, *a))[1])
    one = ([1, 1], [1, 1], [1, 1], 1)
    shared(one, one)  # zero points 0 and 100
    shared(one)
    assert made == [True, False]


# ------------------------------------------------------------------------------------------------- the packed weight
@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("groups, out, inner", [(1, 17, 19), (1, 64, 64), (4, 16, 8), (32, 32, 1)])
def test_one_packed_weight_serves_every_scale_shape_and_geometry(
    asymmetric: bool, groups: int, out: int, inner: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (out, inner, 3, 3), dtype=torch.int8, generator=generator)
    scale = torch.rand(out, generator=generator) * 0.01 + 0.001
    packed_for = Geometry((1, 1), (1, 1), (1, 1), groups)
    weight = PackedWeight(codes, scale, [2, inner * groups, 14, 14], packed_for, asymmetric)
    assert torch.equal(weight.codes(), codes)
    for x_scale, zero in ((1.0, 0), (0.02, 0), (0.02, 128), (0.5, 3)):
        for stride, padding, dilation, size in ((1, 1, 1, 14), (2, 0, 1, 9), (1, 3, 3, 7), (1, 1, 1, 28)):
            x = torch.randint(0, 256, (2, inner * groups, size, size), dtype=torch.uint8, generator=generator)
            x = x.contiguous(memory_format=torch.channels_last)
            geometry = Geometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
            got = Int8Layer(weight, None, x_scale, zero, geometry, output=Output()).run(x)
            w = codes.double() * scale.double().view(-1, 1, 1, 1)
            expected = F.conv2d((x.double() - zero) * x_scale, w, None, stride, padding, dilation, groups)
            assert_close(expected, got)


def test_a_weight_is_packed_alike_whatever_was_packed_before() -> None:
    """torch keeps layouts by shape, and forgets that of two equal shapes one had a zero point and one had none."""

    def packed(space: int, asymmetric: bool) -> int:
        geometry = Geometry((1, 1), (1, 1), (1, 1))
        codes = torch.ones(48, 48, 3, 3, dtype=torch.int8)
        return PackedWeight(codes, torch.ones(48), [2, 48, space, space], geometry, asymmetric).nbytes()

    alone = packed(29, True), packed(31, False)
    assert (packed(31, True), packed(29, False)) == alone


def test_a_merged_weight_may_not_be_larger_than_in_float() -> None:
    def missed(channels: int) -> int:
        b, p = Builder(), Params(0.02, 100)
        x = p.values(1, channels, 3, 3)
        w = b.weight(torch.randn(2 * channels, 1, 3, 3))
        gm = b.done(b.call(aten.conv2d.default, b.act(b.input(x), p), w, None, [1], [1], [1], channels))
        lowered = lower(gm)
        for layer in layers(lowered):
            assert layer.weight.nbytes() <= max(4 * 9 * 2 * channels, 1 << 16) + 2 * channels * 12
        ((expected, got),) = run_both(gm, lowered, x)
        assert_close(expected, got)
        return len(lowered.report.missed)

    assert [missed(n) for n in (6, 64, 1024)] == [0, 0, 0]
    assert missed(1018) == 1  # 2 x 509: no four of them become one, and two are padded to sixteen times the size
