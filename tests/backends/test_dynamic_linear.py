"""Dynamic int8 layers of the CPU backend: codes bit for bit, results within rounding, every kind of input, kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import real_models as rm
from inc_graph.errors import ConfigError
from inc_graph.export import export
from inc_graph.lowering import _dynamic, _dynamic_product
from inc_graph.lowering._dynamic import _codes_by_torch, dynamic_codes, taken
from inc_graph.lowering._dynamic_native import passes
from inc_graph.quantization import DynamicQuantConfig, StaticQuantConfig, convert, load, prepare, quantize, save
from tests.passes.test_dynamic import Block, block

Config = dict[str, Any]
TOKENS: Config = {"act_granularity": "per_token", "w_granularity": "per_channel"}
CONFIGS: tuple[Config, ...] = (
    {},
    TOKENS,
    {**TOKENS, "act_sym": True},
    {**TOKENS, "act_dtype": "int8"},
    {"act_dtype": "int8", "act_sym": True, "w_granularity": "per_channel"},
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["compiled passes", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of everything but the product itself."""
    if request.param == "torch":
        monkeypatch.setenv("INC_NATIVE", "0")
    elif passes() is None:
        pytest.skip("no C compiler")
    taken.clear()
    yield request.param
    assert taken["native" if request.param == "torch" else "torch"] == 0


def quantized(
    model: nn.Module, inputs: tuple[Any, ...], backend: str = "auto", dynamic: Any = None, **config: Any
) -> Any:
    exported = export(model, inputs, dynamic_shapes=dynamic)
    return quantize(exported, DynamicQuantConfig(**config), backend=backend)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a.double() - b.double()).norm() <= tolerance * max(b.double().norm().item(), 1e-6)


# --------------------------------------------------------------------------------------------------------------- codes
@given(
    rows=st.integers(1, 40),
    cols=st.sampled_from([1, 3, 15, 16, 17, 31, 32, 33, 100, 1000]),
    qtype=st.sampled_from(["uint8", "int8", "uint7", "int7"]),
    scheme=st.sampled_from(["symmetric", "asymmetric"]),
    per_row=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    odd=st.sampled_from(["", "nan", "inf", "-inf", "zeros", "tiny", "huge", "positive"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_codes_are_those_of_the_reference(
    rows: int, cols: int, qtype: str, scheme: str, per_row: bool, dtype: torch.dtype, odd: str, seed: int
) -> None:
    if passes() is None:
        pytest.skip("no C compiler")
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=g) * torch.rand(rows, 1, generator=g).mul(8).exp()
    if odd in ("nan", "inf", "-inf"):
        x[torch.rand(rows, cols, generator=g) < 0.2] = float(odd)
    factor = {"zeros": 0.0, "tiny": 1e-38, "huge": 1e37}.get(odd, 1.0)
    x = (x.abs() if odd == "positive" else x * factor).to(dtype)
    codes, params = dynamic_codes(x, qtype, scheme, per_row)
    want, want_params = _codes_by_torch(x, qtype, scheme, per_row)
    assert torch.equal(codes, want)
    torch.testing.assert_close(params, want_params, rtol=0, atol=0, equal_nan=True)
    good = x.isfinite().all(-1) if per_row else x.isfinite().all().reshape(1)
    assert torch.equal(params[0].isfinite(), good)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 33])  # in the vectors of the pass, and behind them
def test_what_is_no_number_stays_visible(way: str, config: Config, bad: float, at: int) -> None:
    """A token with NaN or infinity gives NaN, through fused layers and activations; per token others are as ever."""
    model = nn.Sequential(nn.Linear(37, 40), nn.ReLU(), nn.Linear(40, 8)).eval()
    x = torch.randn(5, 37)
    broken = x.clone()
    broken[2, at] = bad
    whole = quantized(model, (x,), **config)
    for q in (whole, whole.graph, convert(copy.deepcopy(model), DynamicQuantConfig(**config))):
        want, have = q(x).detach(), q(broken).detach()
        assert want.isfinite().all() and have[2].isnan().all()
        if "act_granularity" in config:
            assert torch.equal(have[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
        else:
            assert have.isnan().all()


def test_codes_of_any_layout(way: str) -> None:
    x = torch.randn(6, 5, 32)
    for view in (x, x.transpose(0, 1), x[:, ::2], x[..., ::2], x[0], x[0, 0], x[:0], torch.randn(32, 6).t()):
        codes, params = dynamic_codes(view, "uint8", "asymmetric", True)
        want, want_params = _codes_by_torch(view.reshape(-1, view.shape[-1]), "uint8", "asymmetric", True)
        assert codes.is_contiguous() and torch.equal(codes, want.view(view.shape))
        assert torch.equal(params, want_params)
    taken.clear()  # the torch way is what it was compared with


# -------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_block(way: str, config: Config) -> None:
    model, inputs = block()
    q = quantized(model, inputs, **config)
    y = q(*inputs)
    assert q.report.count("linear") == 6 and not q.report.reference
    assert taken["gemm"] == 4 and sum("dynamic" in line.detail for line in q.report.kernels) == 6
    close(y, q.graph(*inputs), 2e-3)  # a code of the inner layers may be another one: sums are in another order
    close(y, model(*inputs), 0.02 if "act_granularity" in config else 0.05)


def test_three_readers_quantize_once(way: str) -> None:
    model, inputs = block()
    q = quantized(model, inputs, **TOKENS)
    targets = [getattr(n.target, "__name__", "") for n in q.lowered.graph.nodes]
    assert targets.count("dynamic_layer") == 1  # of q, k and v
    assert targets.count("dynamic_codes") == 3  # of x for q, k and v; of out's and up's inputs; down's come as codes
    assert targets.count("dynamic_layer_codes") == 1 and targets.count("dynamic_layer_add") == 2
    assert "gelu.default" not in targets  # it is a part of the pass behind the product
    q(*inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(way: str, dtype: torch.dtype) -> None:
    functions = (F.relu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, torch.tanh)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.ModuleList(nn.Linear(20, 37) for _ in functions)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [f(fc(x)) for f, fc in zip(functions, self.fc, strict=True)]

    torch.manual_seed(0)
    x = torch.randn(9, 20, dtype=dtype) * 3
    q = quantized(Net().to(dtype).eval(), (x,), **TOKENS)
    left = {n.target for n in q.lowered.graph.nodes}
    assert torch.ops.aten.tanh.default in left and not left & {torch.ops.aten.relu.default, torch.ops.aten.silu.default}
    for a, b in zip(q(x), q.graph(x), strict=True):
        close(a, b, {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_is_exact_up_to_the_sums(way: str, bias: bool) -> None:
    """Differential: the codes are the reference's, so nothing but the order of float32 sums can differ."""
    torch.manual_seed(0)
    for config in CONFIGS:
        x = torch.randn(7, 50) + 1
        q = quantized(nn.Linear(50, 30, bias=bias).eval(), (x,), **config)
        close(q(x), q.graph(x), 1e-6)


def test_rows_and_layouts(way: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8).eval()
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    for config in CONFIGS:
        q = quantized(layer, (torch.randn(3, 4, 16),), dynamic=dims, **config)
        for x in (torch.randn(5, 1, 16), torch.randn(1, 1, 16), torch.randn(4, 3, 16).transpose(0, 1),
                  torch.randn(3, 4, 32)[..., ::2], torch.randn(0, 4, 16)):  # fmt: skip
            y = q(x)
            assert y.shape == (*x.shape[:-1], 8) and y.dtype == x.dtype
            if x.numel():
                close(y, q.graph(x), 1e-6)


def test_layer_by_layer() -> None:
    model, inputs = block()
    whole = quantized(model, inputs, **TOKENS)(*inputs)
    for q in (
        quantize(copy.deepcopy(model), DynamicQuantConfig(**TOKENS)),
        convert(copy.deepcopy(model), DynamicQuantConfig(**TOKENS)),
        convert(prepare(copy.deepcopy(model), DynamicQuantConfig(**TOKENS))),
    ):
        assert isinstance(q, Block) and q.report.count("linear") == 6
        close(q(*inputs), whole, 2e-3)


# ------------------------------------------------------------------------------------------------- torch.compile & Co.
@pytest.mark.parametrize("freezing", [False, True])
def test_compiled(freezing: bool) -> None:
    import torch._inductor.config as inductor

    model, inputs = block()
    q = quantized(model, inputs, **TOKENS)
    with inductor.patch(freezing=freezing), torch.no_grad():
        compiled = torch.compile(q, fullgraph=_dynamic.HAS_OPAQUE)
        want = q(*inputs)
        taken.clear()
        close(compiled(*inputs), want, 2e-3)
        assert taken["gemm"] == 4
    torch._dynamo.reset()


def test_copied_and_saved(tmp_path: Path) -> None:
    model, inputs = block()
    q = quantized(model, inputs, **TOKENS)
    want = q(*inputs)
    assert torch.equal(copy.deepcopy(q)(*inputs), want)
    save(q, tmp_path / "q")
    again = load(tmp_path / "q")
    assert torch.equal(again(*inputs), want) and again.report.count("linear") == 6
    layers = quantize(copy.deepcopy(model), DynamicQuantConfig(**TOKENS))
    save(layers, tmp_path / "layers")
    close(load(tmp_path / "layers", original_model=model)(*inputs), layers(*inputs), 0.0)


# ------------------------------------------------------------------------------------------------------ what has none
def test_what_has_no_kernel_is_computed_and_said() -> None:
    model, inputs = block()
    torch.manual_seed(0)
    q = quantized(model, inputs, w_sym=False)
    assert {line.op for line in q.report.reference} == {"linear"} and q.report.reference[0].detail.startswith("asymm")
    close(q(*inputs), q.graph(*inputs), 2e-3)
    floats = {line.op: line.detail for line in q.report.floats}
    assert floats["matmul"] == "backend 'inductor' has no quantized kernel for matmul"
    named = DynamicQuantConfig(**TOKENS).set_local(torch.matmul, DynamicQuantConfig(**TOKENS))
    q = quantize(export(model, inputs), named)
    assert [line.op for line in q.report.reference] == ["matmul", "matmul"] and q.report.count("linear") == 6
    close(q(*inputs), model(*inputs), 0.03)


def test_beside_static_layers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv1d(4, 4, 1), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x))

    torch.manual_seed(0)
    x, model = torch.randn(2, 4, 5), Two().eval()
    local = StaticQuantConfig().set_local(nn.Linear, DynamicQuantConfig(**TOKENS))
    for config in (local, StaticQuantConfig(white_list=[nn.Conv1d]) + DynamicQuantConfig(**TOKENS)):
        prepared = prepare(export(model, (x,)), config)
        prepared(x)
        q = convert(prepared)
        kernels = {line.op: line.detail for line in q.report.kernels}
        assert kernels == {"conv1d": "int8 convolution", "linear": "int8 linear, dynamic uint8, per token"}
        close(q(x), model(x), 0.03)


def test_bad_input_changes_nothing() -> None:
    class NoLayer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, -1) + 1

    for config in (DynamicQuantConfig(), DynamicQuantConfig(**TOKENS)):
        with pytest.raises(ConfigError, match=r"nothing in this model can be quantized.*softmax"):
            quantize(export(NoLayer().eval(), (torch.ones(2, 3),)), config)
        with pytest.raises(ConfigError, match="nothing in this model can be quantized"):
            quantize(NoLayer().eval(), config)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    exported = export(model, (torch.ones(2, 4),))
    before = exported.code
    q = quantize(exported, DynamicQuantConfig(**TOKENS))
    assert [(x.module, x.detail) for x in q.report.floats] == [("1", "its weight 1.weight holds NaN or infinity")]
    assert exported.code == before and q.report.count("linear") == 1
    for field, value in (("act_granularity", "per_row"), ("act_dtype", "nf4"), ("w_granularity", "per_token")):
        with pytest.raises(ConfigError, match=rf"DynamicQuantConfig.{field}"):
            DynamicQuantConfig(**{field: value})


@pytest.mark.real_model
@pytest.mark.slow
def test_minilm() -> None:
    """36 layers in 24 products (q, k and v are one), 18 passes of quantization; close to the float model."""
    model, tokenizer, documents, _ = rm.minilm()
    q = quantized(model, next(rm.batches(tokenizer, documents[:10], 10)), **TOKENS)
    taken.clear()
    embeddings = rm.embed(q, tokenizer, documents)
    assert q.report.count("linear") == 36 and taken["gemm"] == 5 * 24 and not q.report.reference
    assert rm.sqnr_db(rm.embed(model, tokenizer, documents), embeddings) >= 26.4


# ------------------------------------------------------------------------------------------ products of activations
class Scores(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul((q @ k.transpose(-1, -2)).softmax(-1), v)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_products_of_activations(way: str, config: Config) -> None:
    """By name: in batches, the values of the codes, bit for bit, without the operators of the reference."""
    model, inputs = Scores().eval(), tuple(torch.randn(2, 3, 16, 8) for _ in range(3))
    named = DynamicQuantConfig(**config).set_local(torch.matmul, DynamicQuantConfig(**config))
    q = quantize(export(model, inputs), named)
    rows = config.get("act_granularity") == "per_token"
    lines = q.report.reference if rows else q.report.kernels
    assert [line.op for line in lines] == ["matmul", "matmul"]
    assert all(("a scale for each row" if rows else "float32 on the values") in line.detail for line in lines)
    assert not [n for n in q.lowered.graph.nodes if str(n.target).startswith("inc.")]
    assert torch.equal(q(*inputs), q.graph(*inputs))
    close(q(*inputs), model(*inputs), 0.05)


@pytest.mark.parametrize("config", [c for c in CONFIGS if "act_granularity" not in c], ids=str)
@pytest.mark.parametrize("shape", [(20,), (2, 10)], ids=str)
def test_large_products_are_int8(way: str, monkeypatch: pytest.MonkeyPatch, config: Config, shape: Any) -> None:
    monkeypatch.setattr(_dynamic_product, "LARGE", 16)
    a, b = torch.randn(*shape, 70) + 0.3, torch.randn(70, 33) - 0.1

    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.matmul(a, b)

    named = DynamicQuantConfig(**config).set_local(torch.matmul, DynamicQuantConfig(**config))
    q = quantize(export(Product().eval(), (a, b)), named)
    taken.clear()
    y = q(a, b)
    assert taken["int8 product"] == 1 and not taken["float product"]
    torch.testing.assert_close(y, q.graph(a, b), rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(q)(a, b), y)
