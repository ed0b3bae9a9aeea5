"""The CUDA backend without a GPU: its graphs on fake CUDA tensors, and on CPU tensors with the two operators of torch
that it calls written down in `tinygemm`. Tests on a real one at the end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import LoweringError
from inc_graph.lowering import _cuda_linear as linear
from inc_graph.lowering import cuda
from inc_graph.lowering._cuda_layout import pairs_of, tiled
from inc_graph.ops import DEQUANTIZE, UNPACK
from inc_graph.quantization import RTNConfig, StaticQuantConfig, load, quantize
from inc_graph.registry import BACKENDS
from inc_graph.utils import choose_backend
from tests.backends import tinygemm
from tests.backends.qdq import Builder, Params, calls, lower, run_both
from tests.backends.test_weight_only_claims import graph, packed

aten = torch.ops.aten
DYNAMIC = torch.export.Dim.DYNAMIC
FEW = linear.FEW
X = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
W = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INC_COMPUTE_DTYPE", raising=False)
    monkeypatch.delenv("INC_TARGET_DEVICE", raising=False)
    linear.taken.clear()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is there, as far as the backend asks."""
    monkeypatch.setattr(cuda.Cuda, "available", lambda self: None)
    monkeypatch.setattr(cuda, "has_bf16", lambda device: True)


@pytest.fixture
def emulated(pretended: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its tensors are on the CPU."""
    monkeypatch.setattr(cuda.Cuda, "device", "cpu")
    with tinygemm.on_cpu():
        yield


def close(expected: Tensor, got: Tensor, tolerance: float = 0.02) -> None:
    assert expected.shape == got.shape and expected.dtype == got.dtype
    assert (expected - got).norm() <= tolerance * expected.norm()


def detail(lowered: Any) -> str:
    ((text, _),) = lowered.report.kernels.values()
    return str(text)


# ------------------------------------------------------------------------------------------------------------- claims
@pytest.mark.parametrize("qtype, block, asymmetric", [
    ("int4", (1, 32), False), ("uint4", (1, 32), True), ("uint4", (1, 32), False),
])  # fmt: skip
def test_four_bits_go_to_the_packed_kernel(qtype: str, block: Any, asymmetric: bool, emulated: None) -> None:
    gm = graph(X, W, qtype, block, asymmetric=asymmetric)
    lowered = lower(gm, "cuda")
    assert calls(lowered) == ["cuda_linear"] and lowered.report.claimed == {"weight-only linear": 1}
    assert detail(lowered) == f"weight-only {qtype} linear, bfloat16 (packed up to {FEW} rows)"
    ((expected, got),) = run_both(gm, lowered, X)
    close(expected, got)
    assert set(linear.taken) == {"packed"}
    held = dict(lowered.graph.named_buffers())
    assert "packed" not in held and held["packed_tiled"].nbytes == gm.packed.nbytes  # the only copy
    assert list(lowered.packed) == ["packed"] and torch.equal(lowered.packed["packed"](), gm.packed)


@pytest.mark.parametrize("qtype, block, why", [
    ("nf4", (1, 32), "nf4 codes"), ("int8", (1, -1), "int8 codes"), ("int3", (1, 32), "int3 codes"),
    ("fp8_e4m3", (1, -1), "fp8_e4m3 codes"), ("int4", (1, 20), "groups of 20"),
    ("int4", (1, -1), "groups of 96"), ("int4", (8, 1), "blocks [8, 1]"),
    ("int4", (1, 64), "groups of 64"),  # the last one is shorter
])  # fmt: skip
def test_what_the_packed_kernel_cannot_take_is_dequantized(qtype: str, block: Any, why: str, emulated: None) -> None:
    gm = graph(X, W, qtype, block)
    lowered = lower(gm, "cuda")
    assert calls(lowered) == ["cuda_linear"] and not lowered.packed and not lowered.report.reference
    assert detail(lowered) == f"weight-only {qtype} linear, bfloat16 (dequantized at each call: {why})"
    ((expected, got),) = run_both(gm, lowered, X)
    close(expected, got)
    assert set(linear.taken) == {"values"}


@pytest.mark.parametrize("rows, cols, why", [(36, 96, "36 x 96 entries"), (40, 64, None), (40, 48, "groups of 32")])
def test_sizes_that_fill_no_tiles(rows: int, cols: int, why: str | None, emulated: None) -> None:
    text = detail(lower(graph(X[:, :cols], W[:rows, :cols]), "cuda"))
    assert ("packed up to" in text) if why is None else f"each call: {why})" in text


def test_a_scale_that_is_quantized_itself_is_dequantized(emulated: None) -> None:
    gm = graph(X, W, "int4", (1, 32), double=True)
    lowered = lower(gm, "cuda")
    assert "scales that are quantized too" in detail(lowered)
    ((expected, got),) = run_both(gm, lowered, X)
    close(expected, got)


def test_another_compute_dtype_takes_no_packed_kernel(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_COMPUTE_DTYPE", "float32")
    gm = graph(X, W)
    lowered = lower(gm, "cuda")
    assert detail(lowered) == "weight-only int4 linear, float32 (dequantized at each call: in float32)"
    ((expected, got),) = run_both(gm, lowered, X)
    close(expected, got, 1e-6)


def test_a_gpu_without_bfloat16_computes_in_the_dtype_of_its_input(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "has_bf16", lambda device: False)
    assert detail(lower(graph(X, W), "cuda")).startswith("weight-only int4 linear, float32 (")


def test_a_weight_that_is_read_twice_is_laid_out_once(emulated: None) -> None:
    b = Builder()
    w = packed(b, torch.randn(96, 96, generator=torch.Generator().manual_seed(1)), "int4", [1, 32])
    y = b.call(aten.relu.default, b.call(aten.linear.default, b.input(X), w, None))
    gm = b.done(b.call(aten.linear.default, y, w, None))
    lowered = lower(gm, "cuda")
    assert lowered.report.claimed == {"weight-only linear": 2}
    assert len([n for n in dict(lowered.graph.named_buffers()) if n.endswith("tiled")]) == 1
    ((expected, got),) = run_both(gm, lowered, X)
    close(expected, got)


def test_tables_and_convolutions(emulated: None) -> None:
    b, index = Builder(), torch.tensor([[3, 39], [0, 3]])
    gm = b.done(b.call(aten.embedding.default, packed(b, W, "int4", [1, 32]), b.input(index)))
    lowered = lower(gm, "cuda")
    assert calls(lowered) == ["lookup"] and torch.equal(*run_both(gm, lowered, index)[0])
    b, x = Builder(), torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    w = torch.randn(12, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    gm = b.done(b.call(aten.conv2d.default, b.input(x), packed(b, w, "int4", [1, 4, -1, -1]), None))
    lowered = lower(gm, "cuda")
    assert calls(lowered) == ["dequantize_weight", "aten.conv2d.default"]
    assert torch.equal(*run_both(gm, lowered, x)[0])


def test_int8_layers_stay_on_the_reference_and_that_is_said(emulated: None) -> None:
    b, p = Builder(), Params.of(X)
    lowered = lower(b.done(b.call(aten.linear.default, b.act(b.input(X), p), b.weight(W), None)), "cuda")
    assert not lowered.report.kernels
    assert [why for _, why in lowered.report.missed.values()] == ["backend 'cuda' has no quantized kernel for linear"]


def test_a_weight_on_the_cpu_is_left_alone(pretended: None) -> None:
    lowered = lower(graph(X, W), "cuda")
    assert not lowered.report.kernels
    assert "its weight is on cpu; the kernel runs on cuda" in str(lowered.report.missed)


# ---------------------------------------------------------------------------------------------- graphs on a fake GPU
@pytest.mark.parametrize("qtype, block, way", [("int4", 32, "packed"), ("uint4", 64, "packed"), ("int8", -1, "values")])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_the_lowered_graph_of_a_model_on_a_gpu(qtype: str, block: int, way: str, rows: int, pretended: None) -> None:
    b, (n, k) = Builder(), (40, 192)
    with b.mode:
        x = torch.empty(rows, k, device="cuda")
        carrier = torch.uint8 if qtype != "int8" else torch.int8
        codes = torch.empty(n, k if qtype == "int8" else k // 2, dtype=carrier, device="cuda")
        scale = torch.empty(n, 1 if block < 0 else k // block, dtype=torch.float16, device="cuda")
        zero = torch.empty(scale.shape, dtype=torch.uint8, device="cuda") if qtype == "uint4" else None
    read = b.const(codes, "codes")
    read = read if qtype == "int8" else b.call(UNPACK, read, qtype, [n, k])
    z = None if zero is None else b.const(zero, "zero")
    w = b.call(DEQUANTIZE, read, b.const(scale, "scale"), z, [1, block], qtype, torch.float32)
    lowered = BACKENDS.get("cuda").lower(b.done(b.call(aten.linear.default, b.input(x), w, None)))
    assert calls(lowered) == ["cuda_linear"] and ("packed up to" in detail(lowered)) == (way == "packed")
    (node,) = [m for m in lowered.graph.graph.nodes if m.op == "call_function"]
    for value in (node.meta["val"], *(m.meta["val"] for m in node.all_input_nodes)):
        assert value.device.type == "cuda"
    with b.mode:  # what runs inside of the operator, by torch's own descriptions of its operators
        args = [m.meta["val"] if hasattr(m, "meta") else m for m in node.args]
        y = linear._linear(*args)
    assert (y.shape, y.dtype, y.device.type) == ((rows, n), torch.float32, "cuda")
    assert list(linear.taken) == ["packed" if way == "packed" and rows <= FEW else "values"]


# ----------------------------------------------------------------------------------------------------------- operator
def arguments(x: Tensor, few: bool, bias: Tensor | None = None) -> tuple[Any, ...]:
    gm = graph(X, W)
    if not few:
        return x, gm.packed, gm.scale, None, None, bias, [1, 32], "int4", torch.bfloat16
    pairs = pairs_of(gm.scale, None, True)
    return x, tiled(gm.packed, True), gm.scale, None, pairs, bias, [1, 32], "int4", torch.bfloat16


@pytest.mark.parametrize("rows, way", [(0, "values"), (1, "packed"), (FEW, "packed"), (FEW + 1, "values")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_way_is_chosen_by_the_rows(rows: int, way: str, dtype: torch.dtype, emulated: None) -> None:
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(2))
    y = linear.cuda_linear(*arguments(x, True, bias))
    assert list(linear.taken) == [way] and y.dtype == dtype and y.shape == (rows, 40)
    close(linear.cuda_linear(*arguments(x, False, bias)), y, 0.01)


def test_leading_dimensions_and_strides(emulated: None) -> None:
    x = torch.randn(96, 5, 2, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    y = linear.cuda_linear(*arguments(x, True))
    assert y.shape == (2, 5, 40) and list(linear.taken) == ["packed"]
    close(linear.cuda_linear(*arguments(x.reshape(10, 96), True)).reshape(2, 5, 40), y, 1e-6)


@pytest.mark.parametrize("few", [True, False])
def test_gradients_reach_the_input_and_the_bias_and_keep_no_values(few: bool, emulated: None) -> None:
    bias = torch.randn(40, generator=torch.Generator().manual_seed(2))
    grads = []
    kept: list[int] = []
    for mine in (True, False):
        x, shift = X.clone().requires_grad_(), bias.clone().requires_grad_()
        args = arguments(x, few, shift)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            if mine:
                y = linear.cuda_linear(*args)
                assert sum(kept) < W.nbytes / 4
            else:
                w = linear._weight(args[1], args[2], None, few, [1, 32], "int4", 96, torch.float32)
                y = torch.nn.functional.linear(x, w, shift)
        y.square().sum().backward()
        grads.append((x.grad, shift.grad))
    for got, expected in zip(*grads, strict=True):
        close(expected, got)


@pytest.mark.parametrize("few", [True, False])
def test_the_operator_is_a_proper_one(few: bool, emulated: None) -> None:
    args = arguments(X.clone().requires_grad_(), few, torch.ones(40, requires_grad=True))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.inc_cuda.weight_only_linear.default, args, test_utils=tests)


# --------------------------------------------------------------------------------------------------------- whole models
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).relu()).relu())


Y = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))


def quantized(scope: str, backend: str = "cuda", **options: Any) -> Any:
    torch.manual_seed(0)
    graph = {"example_inputs": Y, "dynamic_shapes": ({0: DYNAMIC},)} if scope == "graph" else {}
    return quantize(Net().eval(), RTNConfig(group_size=32), backend=backend, **graph, **options)


@pytest.fixture(params=["graph", "layers"])
def scope(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_a_model_is_quantized_saved_and_loaded(scope: str, emulated: None, tmp_path: Path) -> None:
    model, exact = quantized(scope), quantized(scope, "eager")
    assert model.report.backend == "cuda" and model.report.count("linear") == 3
    for rows in (4, FEW + 1):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        close(exact(x), model(x))
    assert set(linear.taken) == {"packed", "values"}
    model.save(tmp_path)
    again = load(tmp_path, Net().eval(), backend="cuda")
    assert torch.equal(again(Y), model(Y))
    assert torch.equal(load(tmp_path, Net().eval(), backend="eager")(Y), exact(Y))  # the codes came back as they were
    assert torch.equal(copy.deepcopy(model)(Y), model(Y))


@torch.no_grad()
def test_single_layers_in_float32(scope: str, emulated: None) -> None:
    model = quantized(scope, compute_dtype={"head": "float32"})
    details = {line.module: line.detail for line in model.report.kernels}
    assert "bfloat16 (packed" in details["fc1"] and "float32 (dequantized" in details["head"]


def test_the_environment_chooses_it(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INC_TARGET_DEVICE", "cuda")
    assert choose_backend() == ("cuda", "")
    assert quantized("layers", "auto").report.backend == "cuda"


def test_int8_activations_stay_on_the_reference(emulated: None) -> None:
    model = quantize(Net().eval(), StaticQuantConfig(), lambda m: m(Y), example_inputs=Y, backend="cuda")
    assert not model.report.kernels and len(model.report.reference) == 3
    assert {line.detail for line in model.report.reference} == {"backend 'cuda' has no quantized kernel for linear"}


@torch.no_grad()
def test_compiled_code_sees_what_is_in_the_operator(emulated: None) -> None:
    seen: list[set[str]] = []

    def look(gm: Any, inputs: Any) -> Any:
        seen.append({str(n.target) for n in gm.graph.nodes if n.op == "call_function"})
        return gm.forward

    torch._dynamo.reset()
    model = quantized("graph")
    compiled = torch.compile(model, backend=look, fullgraph=True, dynamic=True)
    for rows in (4, FEW + 1, 7, FEW + 9):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(compiled(x), model(x))
    assert len(seen) == 2  # few rows, many rows
    kernel = [any("_weight_int4pack_mm" in name for name in names) for names in seen]
    assert kernel == [True, False] and not any("inc_cuda" in name for names in seen for name in names)


@torch.no_grad()
def test_an_exported_program_serves_all_rows(emulated: None) -> None:
    model = quantized("graph")
    program = torch.export.export(model, (Y,), dynamic_shapes=(({0: DYNAMIC},),))
    assert "inc_cuda.weight_only_linear.default" in {str(n.target) for n in program.graph.nodes}
    for rows in (4, FEW + 1):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(program.module()(x), model(x))


# ------------------------------------------------------------------------------------------------------- without a GPU
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert BACKENDS.get("cuda").available() == "torch has no CUDA device here"
    name, note = choose_backend("auto", "cuda")
    assert name == "eager" and note == "backend 'cuda' is not available: torch has no CUDA device here; using 'eager'"
    with pytest.raises(LoweringError, match="backend 'cuda' is not available"):
        quantized("layers")


# ---------------------------------------------------------------------------------------------------------- with a GPU
@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("options", [
    {"group_size": 32}, {"group_size": 128, "use_sym": False}, {"dtype": "nf4"}, {"bits": 8}, {"bits": 3},
    {"group_size": -1}, {"group_size": 48},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_what_the_reference_does(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 264)).eval().to("cuda", dtype)
    exact = quantize(copy.deepcopy(model), RTNConfig(**options), backend="eager")
    model = quantize(model, RTNConfig(**options))
    assert model.report.backend == "cuda" and model.report.count("linear") == 2
    compiled = torch.compile(model, dynamic=True)
    for rows in (1, 16, FEW, FEW + 1, 300):
        x = torch.randn(rows, 1024, device="cuda", dtype=dtype)
        close(exact(x), model(x))
        close(model(x), compiled(x))


@needs_gpu
def test_training_an_adapter_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)).eval().cuda()
    model = quantize(model, RTNConfig(group_size=32))
    x = torch.randn(4, 256, device="cuda", requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any())


@torch.no_grad()
def test_a_model_is_moved_trained_in_and_given_other_weights(scope: str, emulated: None) -> None:
    model, exact = quantized(scope), quantized(scope, "eager")
    state = exact.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())  # the codes of the graph
    assert model.train()(Y).shape == (4, 8)
    half = copy.deepcopy(model).to(torch.bfloat16)
    close(exact(Y), half(Y.bfloat16()).float())
    state = {name: t * 2 if "scale" in name else t for name, t in state.items()}
    model.load_state_dict(state)
    exact.load_state_dict(state)
    close(exact(Y), model(Y))
