"""The cost of prepare and convert grows with the size of the graph, and no faster.

The graph is made of small blocks (linear, relu, linear, residual sum, layer norm) over a few shared weights, so that it
is all graph and no arithmetic. Ten times the nodes may take twelve times as long: the rest is the memory of a larger
graph. Time is that of this process, as other processes on the machine are no concern of ours, and outside of the
kernel: small runs get the memory of those before them, a large one waits for the kernel to hand out more.
"""

from __future__ import annotations

import cProfile
import gc
import os
import pstats
from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inc_graph.graph import set_level
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.registry import BACKENDS
from inc_graph.utils.device import choose_backend

aten = torch.ops.aten
WIDTH, WEIGHTS = 4, 8


def synthetic(nodes: int, weights: int = WEIGHTS) -> fx.GraphModule:
    """A float graph of about so many nodes over so many weights, written down without an exporter."""
    gm, mode = fx.GraphModule(nn.Module(), fx.Graph()), FakeTensorMode()
    gm.meta = {"inc": {}}
    generator = torch.Generator().manual_seed(0)
    reads = []
    for i in range(weights):
        pair = torch.randn(WIDTH, WIDTH, generator=generator) / 2, torch.randn(WIDTH, generator=generator)
        for name, tensor in zip((f"w{i}", f"b{i}"), pair, strict=True):
            gm.register_parameter(name, nn.Parameter(tensor))
    x = gm.graph.placeholder("x")
    x.meta["val"] = value = mode.from_tensor(torch.zeros(2, WIDTH))
    for name, tensor in gm.named_parameters():
        reads.append(gm.graph.get_attr(name))
        reads[-1].meta["val"] = mode.from_tensor(tensor.detach())

    def call(target: Any, *args: Any) -> fx.Node:
        node = gm.graph.call_function(target, args)
        node.meta["val"] = value
        return node

    for i in range(nodes // 5):
        layer = reads[2 * (i % weights) : 2 * (i % weights) + 2]
        y = call(aten.relu.default, call(aten.linear.default, x, *layer))
        y = call(aten.add.Tensor, call(aten.linear.default, y, *layer), x)
        x = call(aten.layer_norm.default, y, [WIDTH])
    gm.graph.output((x,))
    gm.recompile()
    set_level(gm, "float")
    return gm


def quantized(nodes: int, backend: str, measure: Callable[[Callable[[], Any]], Any], weights: int = WEIGHTS) -> Any:
    """Prepare, calibrate on one row, convert; `measure` calls both ends. Gives the converted model."""
    gm = synthetic(nodes, weights)
    prepared = measure(lambda: prepare(gm, StaticQuantConfig(), backend=backend))
    with torch.no_grad():
        prepared(torch.ones(2, WIDTH))
    q = measure(lambda: convert(prepared))
    assert len(q.report.kernels) + len(q.report.reference) >= 2 * (nodes // 5)
    return q


def seconds(nodes: int, backend: str) -> float:
    total = 0.0

    def measure(f: Callable[[], Any]) -> Any:
        nonlocal total
        gc.collect()
        gc.disable()  # as timeit does: when the collector runs, and over what, is not this code's doing
        start = os.times().user
        result = f()
        total += os.times().user - start
        gc.enable()
        return result

    quantized(nodes, backend, measure)
    return total


def function_calls(nodes: int, backend: str) -> int:
    profile = cProfile.Profile()
    quantized(nodes, backend, profile.runcall, weights=1)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INC_VERIFY", raising=False)


@pytest.fixture(params=["eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := BACKENDS.get(request.param).available()) is not None:
        pytest.skip(reason)
    return request.param


def test_work_is_linear(backend: str) -> None:
    """Function calls do not depend on the machine: six times the nodes make no more than six times the calls.

    All layers read one weight, so that work on every reader of a weight at every reader of it would show.
    """
    function_calls(100, backend)  # imports, caches
    small, large = function_calls(150, backend), function_calls(900, backend)
    assert large <= 6.2 * small


@pytest.mark.alone
@pytest.mark.slow
def test_time_is_linear() -> None:
    """On the backend of this machine. Work alone cannot tell what is slow inside of one call, such as a copied set."""
    backend = choose_backend("auto")[0]
    seconds(500, backend)
    # a small run is a tenth of a large one, and so is its share of the machine's slow moments: averaged, on both sides
    small = [seconds(5_000, backend) for _ in range(3)]
    large = seconds(50_000, backend)
    small += [seconds(5_000, backend) for _ in range(3)]
    assert large <= 12 * mean(small)
