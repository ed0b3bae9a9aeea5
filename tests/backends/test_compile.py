"""torch.compile and torch.export of lowered models: the kernels are kept, nothing is recompiled, results stay."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from inc_graph.errors import LoweringError
from inc_graph.export import export
from inc_graph.lowering._codes import dequantize_codes, quantize_codes
from inc_graph.lowering._onednn import HAS_OPAQUE
from inc_graph.quantization import StaticQuantConfig, convert, prepare
from tests.backends.qdq import Params
from tests.backends.test_conversions import QPARAMS, reference

Dim = torch.export.Dim
pytestmark = pytest.mark.skipif(not HAS_OPAQUE, reason="this torch breaks the graph at every layer")


class Images(nn.Module):
    """Convolutions of all kinds, pooling on codes, a residual sum in the kernel, a transposed convolution, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.stem(x), 2))
        x = F.pad(F.relu6(self.point(F.silu(self.depth(x))) + x), (0, 1, 0, 1))
        return self.head(self.up(x).mean((2, 3)))


class Attention(nn.Module):
    """A block of a transformer: [N, S] tokens -> [N, S, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        n, s, _ = x.shape
        q, k, v = self.qkv(x).view(n, s, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, 16))
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


KINDS = ("images", "attention")
KERNELS = {"images": {"conv": 4, "linear": 1}, "attention": {"conv": 0, "linear": 4}}


def inputs(kind: str, n: int, s: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if kind == "images":
        return torch.randn(n, 3, 12, 12, generator=generator)
    return torch.randint(0, 30, (n, s), generator=generator)


def sizes(kind: str) -> dict[int, Any]:
    return {0: Dim("n", min=1, max=64)} | ({1: Dim("s", min=2, max=64)} if kind == "attention" else {})


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {}
    for kind, model in (("images", Images()), ("attention", Attention())):
        exported = export(model.eval(), (inputs(kind, 4),), (sizes(kind),))
        prepared = prepare(exported, StaticQuantConfig())
        prepared(inputs(kind, 8, 12))
        found[kind] = convert(prepared)
    return found


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def kernels(run: Any) -> dict[str, int]:
    """Calls of oneDNN's int8 kernels."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        run()
    names = Counter(e.name for e in prof.events())
    return {
        "conv": names["onednn::qconv_pointwise"] + names["onednn::qconv2d_pointwise"],
        "linear": names["onednn::qlinear_pointwise"],
    }


def assert_same(expected: Tensor, got: Tensor) -> None:
    """Inductor may fuse a multiplication and an addition: a value next to a tie then goes the other way."""
    assert expected.shape == got.shape and expected.stride() == got.stride()
    assert (expected - got).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("freezing", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_every_size(models: dict[str, nn.Module], kind: str, freezing: bool) -> None:
    """Without a graph break, and compiled once although the batch (and the sequence) has another size each time."""
    model = copy.deepcopy(models[kind])
    compiler = CompileCounterWithBackend("inductor")
    with torch._inductor.config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
        _, code = run_and_get_code(compiled, inputs(kind, 4))
        for n, s in ((4, 7), (3, 9), (9, 3), (2, 2)):
            x = inputs(kind, n, s)
            assert_same(models[kind](x), compiled(x))
        assert compiler.frame_count == 1
        assert_same(models[kind](inputs(kind, 1)), compiled(inputs(kind, 1)))  # sizes 0 and 1 are special to torch
        assert compiler.frame_count <= 2
    assert "inc_onednn" in "".join(code)
    assert kernels(lambda: compiled(inputs(kind, 4))) == KERNELS[kind] == kernels(lambda: model(inputs(kind, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_again_and_with_static_sizes(models: dict[str, nn.Module], kind: str) -> None:
    compiler = CompileCounterWithBackend("inductor")
    x, y = inputs(kind, 4), inputs(kind, 5)
    expected = models[kind](x), models[kind](y)
    for _ in range(2):
        compiled = torch.compile(models[kind], fullgraph=True, backend=compiler)
        assert_same(expected[0], compiled(x))
        assert_same(expected[1], compiled(y))
    assert compiler.frame_count == 2  # the first size, then any
    assert torch.equal(models[kind](x), expected[0])  # compiling has not changed the model


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_export(models: dict[str, nn.Module], kind: str, strict: bool) -> None:
    """An exported program keeps the layers as operators (strict: runs of them as one), and runs the kernels."""
    x, y = inputs(kind, 4), inputs(kind, 3, 5)
    program = torch.export.export(models[kind], (x,), dynamic_shapes=((sizes(kind),),), strict=strict)
    for p in (program, program.run_decompositions()):
        calls = [f"{n.target}{n.args}" for n in p.graph.nodes if n.op == "call_function"]
        layers, runs = (sum(f"inc_onednn.{kind}" in call for call in calls) for kind in ("layer", "region"))
        assert (runs > 0) == strict and (runs or layers == sum(KERNELS[kind].values()))
        module = p.module()
        assert kernels(lambda module=module: module(y)) == KERNELS[kind]
        for z in (x, y):
            assert_same(models[kind](z), p.module()(z))


def test_a_packed_layer_is_not_pickled(models: dict[str, nn.Module]) -> None:
    program = torch.export.export(models["images"], (inputs("images", 4),))
    for save in (lambda: pickle.dumps(models["images"]), lambda: torch.export.save(program, io.BytesIO())):
        with pytest.raises(LoweringError, match="cannot be pickled") as caught:
            save()
        assert "save(q_model, folder)" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_copies(models: dict[str, nn.Module], kind: str) -> None:
    """A deep copy runs, gives its Q-DQ graph, and shares the packed weights, which never change."""
    twin = copy.deepcopy(models[kind])
    x = inputs(kind, 4)
    assert torch.equal(twin(x), models[kind](x))
    assert torch.equal(twin.graph(x), models[kind].graph(x))


def test_compiled_conversions_round_as_the_reference() -> None:
    """Under torch.compile ties too: there the formula of the reference is traced."""

    # scales are float32 numbers, as in a graph
    cases = [replace(p, scale=torch.tensor(p.scale).item()) for p in (*QPARAMS, Params(1.0, 101))]
    xs = [torch.cat([p.values(500), torch.arange(-20, 21) * p.scale * 0.5]) for p in cases]

    def both(*xs: Tensor) -> list[tuple[Tensor, Tensor]]:
        codes = [
            quantize_codes(x, p.scale, p.zero_point, getattr(torch, p.qtype)) for x, p in zip(xs, cases, strict=True)
        ]
        back = [dequantize_codes(q, p.scale, p.zero_point, torch.float32) for q, p in zip(codes, cases, strict=True)]
        return list(zip(codes, back, strict=True))

    for x, p, (codes, back) in zip(xs, cases, torch.compile(both, fullgraph=True)(*xs), strict=True):
        expected = reference(x, p)
        assert torch.equal(codes, expected), p
        assert torch.equal(back, dequantize_codes(expected, p.scale, p.zero_point, torch.float32)), p
