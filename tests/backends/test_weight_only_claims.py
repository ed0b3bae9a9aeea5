"""Q-DQ graphs with quantized weights and float inputs, lowered: what is claimed, what is refused, what runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from inc_graph.errors import ConfigError
from inc_graph.graph import get_attr
from inc_graph.lowering import _weight_only as wo
from inc_graph.lowering._weight_only_claims import choose_dtype
from inc_graph.numerics import choose_qparams, quantize
from inc_graph.ops import DEQUANTIZE, UNPACK
from inc_graph.packing import pack
from inc_graph.qtypes import get_qtype
from inc_graph.registry import BACKENDS
from tests.backends.qdq import Builder, Params, calls, lower, run_both

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_COMPUTE_DTYPE", "float32")


def packed(b: Builder, w: Tensor, qtype: str, block: list[int], asymmetric: bool = False, double: bool = False) -> Any:
    """`unpack -> dequantize` of a weight, as convert-qdq writes it."""
    scale, zero = choose_qparams(w, block, qtype, "asymmetric" if asymmetric else "symmetric")
    needs = asymmetric or bool(zero.any())
    q = quantize(w, scale, zero if needs else None, block, qtype)
    z = b.const(zero.to(torch.uint8), "zero") if needs else None
    if get_qtype(qtype).storage_bits < 8:
        codes = b.call(UNPACK, b.const(pack(q, qtype), "packed"), qtype, list(w.shape))
    else:
        codes = b.const(q, "codes")
    if double:
        flat = scale.reshape(1, -1)
        s2, _ = choose_qparams(flat, [1, 256], "int8", "symmetric")
        inner = b.const(quantize(flat, s2, None, [1, 256], "int8"), "scale_codes")
        values = b.call(DEQUANTIZE, inner, b.const(s2, "scale_scale"), None, [1, 256], "int8", torch.float32)
        s = b.call(aten.reshape.default, values, list(scale.shape))
    else:
        s = b.const(scale.half(), "scale")
    return b.call(DEQUANTIZE, codes, s, z, block, qtype, w.dtype)


def graph(x: Tensor, w: Tensor, qtype: str = "int4", block: Any = (1, 32), **how: Any) -> fx.GraphModule:
    b = Builder()
    return b.done(b.call(aten.linear.default, b.input(x), packed(b, w, qtype, list(block), **how), b.const(w[:, 0])))


def agree(gm: fx.GraphModule, lowered: Any, *x: Tensor, tolerance: float = 1e-5) -> None:
    for expected, got in run_both(gm, lowered, *x):
        assert (expected - got).abs().max() <= tolerance * (1 + expected.abs().max())


X, W = (
    torch.randn(3, 72, generator=torch.Generator().manual_seed(0)),
    torch.randn(40, 72, generator=torch.Generator().manual_seed(1)),
)


@pytest.mark.parametrize("qtype, block, asymmetric", [
    ("int4", (1, 32), False), ("uint4", (1, 32), True), ("int3", (1, -1), False), ("uint2", (1, 16), True),
    ("nf4", (1, 64), False), ("fp4", (1, 32), False), ("int8", (1, -1), False), ("uint8", (1, 32), True),
    ("fp8_e4m3", (1, -1), False), ("int4", (8, 1), False), ("mxfp4", (1, 32), False),
])  # fmt: skip
def test_a_linear_layer_is_one_call_on_the_tensors_of_the_graph(qtype: str, block: Any, asymmetric: bool) -> None:
    gm = graph(X, W, qtype, block, asymmetric=asymmetric)
    lowered = lower(gm)
    assert calls(lowered) == ["weight_only_linear"]
    assert lowered.report.claimed == {"weight-only linear": 1} and not lowered.report.reference
    assert [d.startswith("weight-only") for d, _ in lowered.report.kernels.values()] == [True]
    agree(gm, lowered, X)
    for node in lowered.graph.graph.find_nodes(op="get_attr"):
        assert get_attr(lowered.graph, node.target) is get_attr(gm, node.target)  # shared, not copied
    held = sum(b.nbytes for b in lowered.graph.buffers())
    assert held < W.nbytes * (0.6 if get_qtype(qtype).storage_bits >= 8 or block == (8, 1) else 0.35)


def test_the_call_holds_the_tensors_of_the_graph_and_what_they_mean() -> None:
    lowered = lower(graph(X, W, "uint4", (1, 32), asymmetric=True))
    (node,) = [n for n in lowered.graph.graph.nodes if n.op == "call_function"]
    assert node.target is wo.weight_only_linear
    x, codes, scale, zero, bias, block, qtype, dtype = node.args
    assert [n.target for n in (codes, scale, zero, bias)] == ["packed", "scale", "zero", "c"] and x.op == "placeholder"
    assert (block, qtype, dtype) == ([1, 32], "uint4", torch.float32)
    assert tuple(node.meta["val"].shape) == (3, 40)


def test_a_scale_that_is_quantized_itself() -> None:
    gm = graph(X, W, "nf4", (1, 32), double=True)
    lowered = lower(gm)
    assert calls(lowered) == ["dequantize_weight", "aten.reshape.default", "weight_only_linear"]
    agree(gm, lowered, X)


def test_order_of_the_input_channels_stays_before_the_layer() -> None:
    b = Builder()
    order = torch.randperm(72, generator=torch.Generator().manual_seed(2))
    x = b.call(aten.index_select.default, b.input(X), -1, b.const(order, "order"))
    gm = b.done(b.call(aten.linear.default, x, packed(b, W, "int4", [1, 32]), None))
    lowered = lower(gm)
    assert calls(lowered) == ["aten.index_select.default", "weight_only_linear"]
    agree(gm, lowered, X)


def test_a_weight_that_is_read_twice_is_kept_once() -> None:
    b = Builder()
    w = packed(b, torch.randn(72, 72, generator=torch.Generator().manual_seed(1)), "int4", [1, 32])
    y = b.call(aten.linear.default, b.input(X), w, None)
    gm = b.done(b.call(aten.linear.default, b.call(aten.relu.default, y), w, None))
    lowered = lower(gm)
    assert lowered.report.claimed == {"weight-only linear": 2}
    assert len(lowered.graph.graph.find_nodes(op="get_attr")) == 2
    agree(gm, lowered, X, tolerance=1e-4)


@pytest.mark.parametrize("qtype, block", [("int4", [1, 32]), ("nf4", [1, -1]), ("int8", [1, 24])])
def test_a_table_gives_the_rows_that_are_asked_for(qtype: str, block: list[int]) -> None:
    b, index = Builder(), torch.tensor([[3, 39], [0, 3]])
    gm = b.done(b.call(aten.embedding.default, packed(b, W, qtype, block), b.input(index)))
    lowered = lower(gm)
    assert calls(lowered) == ["lookup"] and lowered.report.claimed == {"weight-only lookup": 1}
    ((expected, got),) = run_both(gm, lowered, index)
    assert torch.equal(expected, got)


def test_a_table_tied_to_a_head() -> None:
    b, index = Builder(), torch.tensor([[3, 39], [0, 3]])
    w = packed(b, W, "int4", [1, 32])
    gm = b.done(b.call(aten.linear.default, b.call(aten.embedding.default, w, b.input(index)), w, None))
    lowered = lower(gm)
    assert calls(lowered) == ["lookup", "weight_only_linear"]
    agree(gm, lowered, index)


def test_a_convolution_gets_its_weight_dequantized() -> None:
    b = Builder()
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    w = torch.randn(12, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    gm = b.done(b.call(aten.conv2d.default, b.input(x), packed(b, w, "int4", [1, 4, -1, -1]), None))
    lowered = lower(gm)
    assert calls(lowered) == ["dequantize_weight", "aten.conv2d.default"] and not lowered.report.reference
    assert not lowered.report.kernels and len(lowered.report.missed) == 1
    agree(gm, lowered, x)


# --------------------------------------------------------------------------------------------------------- left alone
def test_static_int8_stays_with_the_int8_layers() -> None:
    b = Builder()
    p = Params.of(X)
    gm = b.done(b.call(aten.linear.default, b.act(b.input(X), p), b.weight(W), None))
    assert lower(gm).report.claimed["int8 linear"] == 1


def test_a_weight_that_is_computed_is_left_to_the_reference() -> None:
    b = Builder()
    w, x = b.input(W), b.input(X)  # the last one is the first argument
    scale, _ = choose_qparams(W, [1, -1], "int8", "symmetric")
    s = b.const(scale)
    codes = b.call(torch.ops.inc.quantize.default, w, s, None, [1, -1], "int8")
    gm = b.done(b.call(aten.linear.default, x, b.call(DEQUANTIZE, codes, s, None, [1, -1], "int8", W.dtype), None))
    lowered = lower(gm)
    assert "weight_only_linear" not in calls(lowered)
    assert lowered.report.missed["linear_default"][1] == "its weight is not a constant"
    agree(gm, lowered, X, W)


def test_a_float_layer_is_nobodys_business() -> None:
    b = Builder()
    lowered = lower(b.done(b.call(aten.linear.default, b.input(X), b.const(W), None)))
    assert not lowered.report.claimed and not lowered.report.missed


# ------------------------------------------------------------------------------------------------------ compute dtype
def test_compute_dtype_is_chosen_by_argument_environment_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype(torch.float32) == torch.float32  # the environment of this file
    assert choose_dtype(torch.float32, torch.bfloat16) == torch.bfloat16
    monkeypatch.setenv("INC_COMPUTE_DTYPE", "int8")
    with pytest.raises(ConfigError, match="INC_COMPUTE_DTYPE='int8'"):
        choose_dtype(torch.float32)
    monkeypatch.delenv("INC_COMPUTE_DTYPE")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose_dtype(dtype) == wo.fast_dtype()
    assert choose_dtype(torch.float64) == torch.float64


def test_the_backends_attribute_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS.get("inductor"), "compute_dtype", torch.bfloat16)
    lowered = lower(graph(X, W))
    (node,) = [n for n in lowered.graph.graph.nodes if n.op == "call_function"]
    assert node.args[7] == torch.bfloat16
    assert lowered.graph(X)[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------- what users do next
def test_a_lowered_graph_is_copied_saved_moved_and_compiled() -> None:
    lowered = lower(graph(X, W)).graph
    expected = lowered(X)[0]
    again = copy.deepcopy(lowered)
    again.load_state_dict({k: v.clone() for k, v in lowered.state_dict().items()})
    assert torch.equal(again(X)[0], expected)
    assert set(lowered.state_dict()) >= {"packed", "scale"}
    half = copy.deepcopy(lowered).to(torch.bfloat16)(X.bfloat16())[0]
    assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.02 * expected.abs().max()
    compiled = torch.compile(BACKENDS.get("inductor").for_compile(lowered), fullgraph=True)
    torch.testing.assert_close(compiled(X)[0], expected)
    program = torch.export.export(lowered, (X,))
    torch.testing.assert_close(program.module()(X)[0], expected)
