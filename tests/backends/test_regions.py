"""Runs of layers as one operator under torch.compile: what is grouped, that results stay, that memory is freed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from inc_graph.errors import LoweringError
from inc_graph.export import export
from inc_graph.lowering import _onednn, _regions
from inc_graph.lowering._onednn import HAS_OPAQUE, Int8Layer
from inc_graph.lowering._packed import PackedWeight
from inc_graph.lowering._regions import NotTraced, Region, for_compile, run_region
from inc_graph.quantization import StaticQuantConfig, convert, prepare

needs_regions = pytest.mark.skipif(not HAS_OPAQUE, reason="this torch has no opaque operators")


class Chain(nn.Module):
    """Seven convolutions with a residual sum, and a linear layer behind a pooling."""

    def __init__(self, block: str = "sum") -> None:
        super().__init__()
        self.block = block
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(7))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        a, b, c, d, e, f, g = self.convs
        x = F.relu(b(F.relu(a(x))))
        x = F.relu(d(F.relu(c(x))) + x)  # a sum whose memory belongs to the run
        if self.block == "sigmoid":
            x = torch.sigmoid(x)
        if self.block == "two":
            y, z = F.relu(e(x)), F.relu(f(x))
            return y.sin(), z.sin()
        x = self.up(F.relu(g(F.relu(f(F.relu(e(x)))))))
        return self.head(x.mean((2, 3)))


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 8, 6, 6, generator=torch.Generator().manual_seed(n))


def quantized(block: str = "sum") -> Any:
    torch.manual_seed(0)
    batch = torch.export.Dim("n", min=1, max=64)
    prepared = prepare(export(Chain(block).eval(), (image(),), ({0: batch},)), StaticQuantConfig())
    prepared(image(8))
    return convert(prepared)


def regions(gm: Any) -> list[Region]:
    return [getattr(gm, n.args[1].target) for n in gm.graph.nodes if n.target is run_region]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@needs_regions
@pytest.mark.parametrize(
    ("block", "steps"), [("sum", [9]), ("sigmoid", [2, 2, 5]), ("two", [6])]
)  # the spread of the transposed convolution is a step of its own
def test_what_is_grouped(block: str, steps: list[int]) -> None:
    """Every run of layers, nothing else; the same results; the lowered graph itself is not changed."""
    model = quantized(block)
    before = str(model.lowered.graph)
    grouped = for_compile(model.lowered)
    assert [len(r.steps) for r in regions(grouped)] == steps
    assert str(model.lowered.graph) == before and not regions(model.lowered)
    grouped.graph.lint()
    assert all("val" in n.meta for n in grouped.graph.nodes if n.op == "call_function")
    for n in (1, 2, 5):
        expected, got = model(image(n)), grouped(image(n))
        for one, other in zip(expected, got, strict=True):
            assert torch.equal(one, other)


@needs_regions
def test_torch_compile_takes_the_regions() -> None:
    model = quantized()
    x = image()
    expected = model(x)
    got, code = run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert "inc_onednn.region" in "".join(code) and "".join(code).count("inc_onednn.layer.default(") <= 1
    assert (got - expected).norm() <= 0.02 * expected.norm()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    got, code = run_and_get_code(torch.compile(twin, fullgraph=True), x)
    assert "inc_onednn.region" in "".join(code)
    assert (got - expected).norm() <= 0.02 * expected.norm()


def layer(**more: Any) -> Int8Layer:
    w = torch.randint(-127, 128, (8, 8), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    out = _onednn.Output(torch.uint8, 0.1, 100)
    return Int8Layer(PackedWeight(w, torch.full((8,), 0.01), [4, 8]), None, 0.1, 100, output=out, **more)


def graph_of(build: Any) -> fx.GraphModule:
    """`build(root, x, y)` on proxies, with shapes for [2, 8] codes."""
    root = nn.Module()
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    values = [fx.Proxy(graph.placeholder(name), tracer) for name in "xy"]

    def attribute(name: str, value: Any) -> fx.Proxy:
        setattr(root, name, value)
        return fx.Proxy(graph.get_attr(name), tracer)

    graph.output(build(graph, attribute, *values))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(2, 8, dtype=torch.uint8)
    return fx.GraphModule(root, graph)


@needs_regions
def test_an_input_that_a_sum_would_write_to_is_copied() -> None:
    """The operator promises to change none of its inputs."""

    def build(graph: fx.Graph, attribute: Any, x: fx.Proxy, y: fx.Proxy) -> Any:
        a = attribute("a", layer())
        b = attribute("b", layer(other=_onednn.Other("sum", 0.1, 100)))
        first = graph.call_function(_onednn.int8_layer, (x.node, a.node))
        return graph.call_function(_onednn.int8_layer_sum, (first, y.node, b.node))

    gm = graph_of(build)
    x, y = (torch.randint(0, 256, (2, 8), dtype=torch.uint8) for _ in range(2))
    expected = gm(x, y.clone())
    kept = y.clone()
    assert torch.equal(for_compile(gm)(x, y), expected)
    assert torch.equal(y, kept) and not torch.equal(y, expected)


@needs_regions
def test_values_inside_are_freed_when_they_were_read() -> None:
    def build(graph: fx.Graph, attribute: Any, x: fx.Proxy, y: fx.Proxy) -> Any:
        value = x.node
        for name in "abc":
            value = graph.call_function(_onednn.int8_layer, (value, attribute(name, layer()).node))
        return value

    (region,) = regions(for_compile(graph_of(build)))
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def run(self: Int8Layer, x: Tensor, other: Tensor | None = None) -> Tensor:
        gc.collect()
        alive.append(sum(r() is not None for r in seen))
        out = torch.zeros_like(x)
        seen.append(weakref.ref(out))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Int8Layer, "run", run)
        region.run([torch.zeros(2, 8, dtype=torch.uint8)])
    assert alive == [0, 1, 1]  # the input of the layer that runs, not those of earlier ones


@needs_regions
def test_one_layer_alone_and_a_float_graph_stay_as_they_are() -> None:
    def build(graph: fx.Graph, attribute: Any, x: fx.Proxy, y: fx.Proxy) -> Any:
        return graph.call_function(_onednn.int8_layer, (x.node, attribute("a", layer()).node))

    gm = graph_of(build)
    assert for_compile(gm) is gm
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    assert for_compile(gm) is gm


@needs_regions
def test_a_region_is_shared_by_copies_and_not_pickled() -> None:
    (region,) = regions(for_compile(quantized().lowered))
    assert copy.deepcopy(region) is region is copy.copy(region)
    assert repr(region) == "Region(9 steps)"
    with pytest.raises(LoweringError, match="cannot be pickled"):
        pickle.dumps(region)


def test_without_opaque_operators_the_graph_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph break for the model, not one a layer; copies are their own."""
    monkeypatch.setattr(_regions, "HAS_OPAQUE", False)
    model = quantized()
    assert isinstance(model._for_compile[0], NotTraced)
    twin = copy.deepcopy(model)
    assert twin._for_compile[0].graph is twin.lowered
    x = image()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(torch.compile(twin)(x), model(x))
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= 1
