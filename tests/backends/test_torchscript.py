"""Graphs as TorchScript functions: the same values as the reference, for every shape. Needs no IPEX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from inc_graph.export import export
from inc_graph.lowering._context import OneDnnContext
from inc_graph.lowering._segments import borders, parts
from inc_graph.lowering._torchscript import constant, scriptable, write
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from tests.backends.qdq import Builder, Params
from tests.graph_generator import RandomModel

aten = torch.ops.aten


def functions(gm: fx.GraphModule) -> list[tuple[list[fx.Node], list[fx.Node], Any]]:
    """(inputs, outputs, written function) of each part of a Q-DQ graph."""
    c = OneDnnContext(gm)
    found = []
    for part in parts(gm.graph, lambda n: scriptable(c, n), lambda n: constant(c, n)):
        inputs, outputs = borders(part, lambda n: constant(c, n))
        found.append((inputs, outputs, write(c, part, inputs, outputs)))
    return found


def qdq(model: nn.Module, *x: Tensor, **options: Any) -> fx.GraphModule:
    prepared = prepare(export(model.eval(), x, **options), StaticQuantConfig())
    prepared(*x)
    return convert(prepared, backend="eager").graph


class Mixed(nn.Module):
    """Sizes, arithmetic on them, lists, operators with several results, casts, indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        q, k, v = self.a(x).chunk(3, -1)
        q, k, v = (t.reshape(n, s, 2, 4).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * s, 8)
        top, _ = x.topk(2, dim=-1)
        picked = x[torch.arange(n * s) % 3]
        return self.b(x + picked * top[:, :1].to(torch.float64).to(torch.float32)).view(n, s, 8)


def test_values_for_every_shape() -> None:
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", min=1, max=32), torch.export.Dim("length", min=3, max=32)
    gm = qdq(Mixed(), torch.randn(2, 5, 8), dynamic_shapes=({0: batch, 1: length},))
    ((inputs, outputs, written),) = functions(gm)
    assert [n.op for n in inputs] == ["placeholder"] and len(outputs) == 1
    for shape in ((2, 5, 8), (1, 3, 8), (9, 32, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            for _ in range(3):  # as it is, profiled, optimized
                (got,) = written.function(x)
            torch.testing.assert_close(got, gm(x), rtol=1e-4, atol=1e-4)


def test_what_is_written() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 8), torch.randn(16, 8)
    b, p = Builder(), Params.of(x)
    y = b.call(aten.relu6.default, b.call(aten.linear.default, b.act(b.input(x), p), b.weight(w), None))
    gm = b.done(b.act(y, Params(0.1, 0)))
    ((_, _, written),) = functions(gm)
    kinds = [n.kind() for n in written.function.graph.nodes() if not n.kind().startswith("prim::")]
    assert kinds == [
        "aten::contiguous", "aten::clamp", "aten::quantize_per_tensor", "aten::dequantize", "aten::dequantize",
        "aten::linear", "aten::hardtanh", "aten::quantize_per_tensor", "aten::dequantize",
    ]  # fmt: skip
    assert written.nbytes == w.numel()  # the codes; no float copy of the weight
    (codes,) = written.codes.values()
    assert codes.dtype == torch.qint8 and torch.equal(codes.int_repr(), gm.weight_q)
    torch.testing.assert_close(written.function(x)[0], gm(x)[0])


def test_codes_go_out_as_they_are_in_the_graph() -> None:
    x = torch.randn(4, 8)
    b, p = Builder(), Params.of(x)
    gm = b.done(b.quantize(b.input(x), p))
    ((_, _, written),) = functions(gm)
    (got,) = written.function(x)
    assert got.dtype == torch.uint8 and torch.equal(got, gm(x)[0])


@pytest.mark.parametrize("qtype", ["uint8", "int8", "uint7", "int7"])
def test_what_saturates(qtype: str) -> None:
    p = Params(0.05, 3 if qtype.startswith("u") else -2, qtype)
    x = torch.cat([p.values(64), torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 0.0, 20.0, -20.0])])
    b = Builder()
    gm = b.done(b.act(b.input(x), p))
    ((_, _, written),) = functions(gm)
    torch.testing.assert_close(written.function(x)[0], gm(x)[0])


def test_parts_are_as_few_as_data_flow_allows() -> None:
    """What does not fit splits only what depends on it; writes keep their place; items stay with their source."""
    g = fx.Graph()
    x = g.placeholder("x")
    first = g.call_function(aten.relu.default, (x,))
    alone = g.call_function(aten.sin.default, (x,))  # does not fit, and reads nothing that does
    pair = g.call_function(aten.topk.default, (first, 1))
    odd = g.call_function(aten.sin.default, (first,))
    second = g.call_function(aten.relu.default, (odd,))
    item = g.call_function(__import__("operator").getitem, (pair, 0))
    late = g.call_function(aten.relu.default, (alone,))
    g.output((second, item, late))
    gm = fx.GraphModule(nn.Module(), g)
    fits = (aten.relu.default, aten.topk.default)
    found = parts(gm.graph, lambda n: n.target in fits, lambda n: False)
    assert [[n.name for n in part] for part in found] == [[n.name for n in (first, pair, item, late)], [second.name]]
    gm.graph.lint()
    order = [n.name for n in gm.graph.nodes]
    assert order.index(alone.name) < order.index(first.name) < order.index(late.name) < order.index(odd.name)


@pytest.mark.parametrize("seed", range(8))
def test_random_models_keep_their_values(seed: int) -> None:
    """The graph in its new order gives what it gave; each part gives what its nodes give."""
    model = RandomModel(seed, size=8)
    args, kwargs = model.inputs(seed)
    prepared = prepare(export(model, args, kwargs=kwargs), StaticQuantConfig())
    prepared(*args, **kwargs)
    gm = convert(prepared, backend="eager").graph
    want = convert(prepared, backend="eager").graph(*args, **kwargs)
    for _inputs, outputs, written in functions(gm):
        assert written.function.graph is not None and len(outputs) <= len(list(gm.graph.nodes))
    gm.graph.lint()
    gm.recompile()
    got = gm(*args, **kwargs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])
