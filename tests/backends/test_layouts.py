"""Convolutions write channels last. Whoever was promised another layout gets it, values and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inc_graph.capture import capture
from inc_graph.numerics import choose_qparams, quantize
from tests.backends.qdq import Params, as_qdq, assert_close, calls, lower

P = Params(0.05, 100)


@torch.library.custom_op("inc_test::memory_order", mutates_args=())
def memory_order(x: Tensor) -> Tensor:
    """The entries as they lie in memory: an operator that relies on the layout it was traced with."""
    return x.as_strided((x.numel(),), (1,)).clone()


@memory_order.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.numel())


class Convolution(nn.Module):
    """act(x) -> conv2d, without anything behind it: `then` gets the float result."""

    def __init__(self, then: Callable[[Tensor], Any], channels: int = 4) -> None:
        super().__init__()
        self.then = then
        w = torch.randn(channels, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 3
        scale, _ = choose_qparams(w, [1, -1, -1, -1], "int8")
        self.register_buffer("codes", quantize(w, scale, None, [1, -1, -1, -1], "int8"))
        self.register_buffer("w_scale", scale)
        self.register_buffer("scale", torch.full([1] * 4, P.scale))
        self.register_buffer("zero", torch.full([1] * 4, P.zero_point, dtype=torch.int32))
        self.register_buffer("scale2", torch.full([1] * 2, P.scale))
        self.register_buffer("zero2", torch.full([1] * 2, P.zero_point, dtype=torch.int32))

    def act(self, x: Tensor) -> Tensor:
        scale, zero = (self.scale, self.zero) if x.ndim == 4 else (self.scale2, self.zero2)
        args = (scale, zero, [-1] * x.ndim, P.qtype)
        return torch.ops.inc.dequantize(torch.ops.inc.quantize(x, *args), *args, torch.float32)

    def forward(self, x: Tensor) -> Any:
        w = torch.ops.inc.dequantize(self.codes, self.w_scale, None, [1, -1, -1, -1], "int8", torch.float32)
        return self.then(F.conv2d(self.act(x), w))


def check(then: Callable[[Tensor], Any], x: Tensor | None = None, dynamic: Any = None, *more: Tensor) -> Any:
    x = P.values(2, 3, 6, 6) if x is None else x
    gm = as_qdq(capture(Convolution(then), (x,), dynamic_shapes=dynamic))
    lowered = lower(gm)
    for inputs in (x, *more):
        with torch.no_grad():
            expected, got = gm(inputs), lowered.graph(inputs)
        for e, g in zip(*(r if isinstance(r, tuple) else (r,) for r in (expected, got)), strict=True):
            assert e.shape == g.shape
            if e.is_contiguous() or e.permute(dense(e)).is_contiguous():  # nobody can rely on strides with holes
                assert strides(e) == strides(g)
            assert_close(e, g)
    assert lowered.report.claimed["int8 convolution"] == 1
    return lowered


def strides(x: Tensor) -> list[int]:
    """Those that matter."""
    return [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]


def dense(x: Tensor) -> list[int]:
    """Dimensions in the order of memory."""
    return sorted(range(x.ndim), key=lambda d: -x.stride(d))


READERS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda y: y,
    "view": lambda y: y.view(-1, 64),
    "view of a view": lambda y: y.view(2, 4, 16).permute(0, 2, 1).reshape(-1, 4).view(2, 64),
    "flatten": lambda y: y.flatten(1),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "permuted view": lambda y: y.permute(0, 2, 3, 1).reshape(-1, 4),
    "unflatten": lambda y: y.unflatten(1, (2, 2)),
    "chunk": lambda y: torch.cat(y.chunk(2, 1), 0).view(4, -1),
    "float operators": lambda y: (torch.sigmoid(y) * 2).view(-1, 8),
    "pool": lambda y: F.avg_pool2d(y, 2).view(-1, 16),
    "softmax": lambda y: y.softmax(1).view(-1),
    "layer norm": lambda y: F.layer_norm(y, [4, 4]),
    "as_strided": lambda y: torch.as_strided(y, (2, 2, 3), (1, 5, 7)),
    "as_strided of an operator": lambda y: torch.as_strided(y.sin(), (2, 2, 3), (1, 5, 7)),
    "unknown operator": lambda y: memory_order(y) + memory_order(y.exp().transpose(1, 2).contiguous()),
    "several": lambda y: (y, y.view(-1), y.flatten(2).transpose(1, 2), y[:, ::2]),
    "strided output": lambda y: y[:, 1],
    "transposed output": lambda y: y.transpose(1, 3),
    "expanded output": lambda y: y[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("then", READERS)
def test_readers_get_what_they_were_promised(then: str) -> None:
    check(READERS[then])


def test_bits_of_a_result_lie_where_they_did() -> None:
    assert "aten.view.dtype" in calls(check(lambda y: (y * 0 + 1).view(torch.int32).float()))


@pytest.mark.parametrize("then", ["itself", "view", "several"])
def test_a_channels_last_input_promises_channels_last(then: str) -> None:
    if then == "itself":
        lowered = check(READERS[then], P.values(2, 3, 6, 6).contiguous(memory_format=torch.channels_last))
        assert "aten.clone.default" not in calls(lowered)


@pytest.mark.parametrize("then", ["itself", "view", "flatten", "float operators", "several"])
def test_dynamic_sizes(then: str) -> None:
    sizes = {0: torch.export.Dim("n", min=1, max=9), 2: torch.export.Dim("h", min=4, max=20)}
    reader = {
        "view": lambda y: y.view(y.shape[0], -1),
        "float operators": lambda y: (torch.sigmoid(y) * 2).view(-1, 2),
    }.get(then, READERS[then])
    check(reader, P.values(2, 3, 6, 6), (sizes,), P.values(3, 3, 9, 6), P.values(1, 3, 4, 6))


def test_operators_that_do_not_care_cost_no_copy() -> None:
    lowered = check(lambda y: F.adaptive_avg_pool2d(torch.sigmoid(y), 1).view(-1, 4))
    assert "aten.permute.default" not in calls(lowered) and lowered.graph.code.count("contiguous") == 0


def test_codes_behind_a_layer_are_viewed_where_they_can_be() -> None:
    """conv -> quantize -> flatten -> linear: the move was made before anybody knew the layout of the codes."""

    class Model(Convolution):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return self.act(self.act(y).view(-1, 64))

    x = P.values(2, 3, 6, 6)
    gm = as_qdq(capture(Model(lambda y: y), (x,)))
    lowered = lower(gm)
    assert_close(gm(x), lowered.graph(x), P.scale)
    assert calls(lowered) == ["quantize_codes", "int8_layer", "aten.reshape.default", "dequantize_codes"]


def test_the_lowered_graph_tells_the_truth_about_layouts() -> None:
    """What `meta["val"]` says is what happens."""
    gm = as_qdq(capture(Convolution(lambda y: F.max_pool2d(torch.sigmoid(y), 2).flatten(1)), (P.values(2, 3, 6, 6),)))
    lowered = lower(gm)

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                assert (result.shape, result.stride(), result.dtype) == (
                    n.meta["val"].shape, n.meta["val"].stride(), n.meta["val"].dtype,
                ), n  # fmt: skip
            return result

    Watch(lowered.graph).run(P.values(2, 3, 6, 6))
