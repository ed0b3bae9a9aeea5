"""`MixedPrecisionConfig` as a user meets it: in a graph and layer by layer, with others, saved, on machines without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from inc_graph.errors import ConfigError, IncError, IncWarning, PrecisionWarning
from inc_graph.export import export
from inc_graph.graph import peek_meta, val
from inc_graph.lowering import _half
from inc_graph.quantization import (
    MixedPrecisionConfig,
    RTNConfig,
    StaticQuantConfig,
    TuningConfig,
    autotune,
    convert,
    load,
    prepare,
    quantize,
    save,
)
from inc_graph.report import attribute_bytes
from inc_graph.utils.cpu import CpuInfo
from inc_graph.utils.precision import why_slow


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.norm = nn.LayerNorm(16)
        self.fc, self.head = nn.Linear(16, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.point(nn.functional.relu6(self.deep(x))) + x
        return self.head(nn.functional.gelu(self.fc(self.norm(x.mean((2, 3))))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is there, float16 is not, whatever the machine."""
    monkeypatch.setattr(CpuInfo, "bf16", True)
    monkeypatch.setattr(CpuInfo, "fp16", False)
    for name in ("FORCE_BF16", "FORCE_FP16"):
        monkeypatch.delenv(name, raising=False)


def bf16(**kwargs: Any) -> MixedPrecisionConfig:
    return MixedPrecisionConfig(dtype="bf16", **kwargs)


def close(have: Tensor, want: Tensor, tolerance: float = 0.03) -> None:
    have, want = have.detach(), want.detach()
    assert have.dtype == want.dtype and have.shape == want.shape
    assert float((have - want).norm() / want.norm()) < tolerance


def dtypes(model: Any) -> dict[str, torch.dtype]:
    """Module path -> what the layer computes in."""
    layers = [n for n in model.graph.graph.nodes if "linear" in str(n.target) or "conv" in str(n.target)]
    return {list(n.meta["nn_module_stack"].values())[-1][0].replace("L['self'].", ""): val(n).dtype for n in layers}


# ------------------------------------------------------------------------------------------------------------- it runs
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_graph(backend: str) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    q = convert(model, bf16(), example_inputs=(X,), backend=backend)
    close(q(X), model(X))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if backend == "eager":  # oneDNN fills small weights up to its blocks
        assert attribute_bytes(q) < 0.6 * attribute_bytes(model)
    assert {line.op for line in q.report.kernels} >= {"conv2d", "linear"}
    reasons = {line.op: line.detail for line in q.report.floats}
    assert "sums over many values" in reasons["layer_norm"]
    assert "bf16" in str(q.recipe) and "conv2d" in str(q.report)


def test_all_four_ways() -> None:
    model = net()
    want = convert(model, bf16(), example_inputs=(X,))(X)
    prepared = prepare(model, bf16(), example_inputs=(X,))
    assert torch.equal(convert(prepared)(X), want)
    assert torch.equal(quantize(model, bf16(), example_inputs=(X,))(X), want)
    assert torch.equal(convert(model, {"mixed_precision": {"dtype": "bf16"}}, example_inputs=(X,))(X), want)
    assert torch.equal(copy.deepcopy(convert(prepared))(X), want)


def test_layer_by_layer() -> None:
    """Each layer casts its input, computes in half precision, and casts back; converted once, not twice."""
    model = net()
    q = convert(net(), bf16())
    assert type(q) is Net
    close(q(X), model(X))
    graph: fx.GraphModule = q.fc.inner.graph
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert targets == ["aten._to_copy.default", "aten.linear.default", "aten._to_copy.default"]
    for again in (lambda: prepare(q, bf16()), lambda: convert(q, bf16())):
        with pytest.raises(ConfigError):
            again()


@pytest.mark.parametrize("example", [None, (X,)])
def test_saved_and_loaded(tmp_path: Path, example: Any) -> None:
    model = net()
    q = convert(net(), bf16(), example_inputs=example)
    q.save(tmp_path / "q")
    size = sum(f.stat().st_size for f in (tmp_path / "q").rglob("*.safetensors"))
    assert size < 0.75 * sum(p.nbytes for p in model.parameters())  # of a small model: the header counts
    again = load(tmp_path / "q") if example else load(tmp_path / "q", original_model=net())
    assert torch.equal(again(X), q(X))


@pytest.mark.skipif(not _half.has_kernels(torch.bfloat16), reason="oneDNN has no bfloat16 here")
def test_kernels_are_called_with_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []
    real = _half.HalfLayer.run

    def counted(self: Any, x: Tensor, other: Tensor | None = None) -> Tensor:
        calls.append((self.activation.name, other is not None))
        assert self.weight.tensor.layout == torch._mkldnn and x.dtype == torch.bfloat16
        return real(self, x, other)

    q = convert(net(), bf16(), example_inputs=(X,), backend="inductor")
    monkeypatch.setattr(_half.HalfLayer, "run", counted)
    q(X)
    assert calls == [("relu", False), ("hardtanh", False), ("none", True), ("gelu", False), ("none", False)]
    targets = [str(n.target) for n in q.lowered.graph.nodes if n.op == "call_function"]
    assert not any("aten.conv" in t or "aten.linear" in t or "gelu" in t for t in targets)


@pytest.mark.skipif(not _half.has_kernels(torch.bfloat16), reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize("layer", [
    nn.Conv1d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, dilation=2), nn.Conv2d(4, 8, 3, groups=2, bias=False),
    nn.Conv2d(4, 4, 3, padding="same", groups=4), nn.Conv3d(4, 8, 3, padding=1), nn.Linear(6, 5),
    nn.Linear(6, 5, False), nn.ConvTranspose2d(4, 8, 3), nn.Conv2d(4, 8, 2, padding="same"),
], ids=str)  # fmt: skip
def test_packed_layers_give_what_torch_gives(layer: nn.Module) -> None:
    """Against the same operator of torch in bfloat16; and the weight comes back bit for bit."""
    dims = getattr(layer, "kernel_size", ())
    shape = (2, 4, *[9] * len(dims)) if dims else (3, 7, 6)
    x = torch.randn(shape)
    q = convert(layer.eval(), bf16(), example_inputs=(x,), backend="inductor")
    want = copy.deepcopy(layer).bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(q(x), want, rtol=2**-7, atol=2**-7)
    weights = [t for n, t in q.graph.named_buffers() if t.ndim > 1]
    assert any(torch.equal(w, layer.weight.bfloat16()) for w in weights)  # type: ignore[operator]
    torch.testing.assert_close(gradient(q, x), gradient(layer, x), rtol=2**-5, atol=2**-5)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.skipif(not _half.has_kernels(torch.bfloat16), reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_go_through_packed_layers(compiled: bool) -> None:
    """With what is fused behind them and added to them. torch's packed operators alone would let none pass."""
    model = net()
    q = convert(net(), bf16(), example_inputs=(X,), backend="inductor")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = gradient(torch.compile(q) if compiled else q, X)
    want = gradient(model, X)
    assert 20 * torch.log10(want.norm() / (got - want).norm()) > 25


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [False, True])
def test_compiled(freezing: bool) -> None:
    import torch._inductor.config as inductor

    q = convert(net(), bf16(), example_inputs=(X,))
    with torch.no_grad(), inductor.patch(freezing=freezing):
        torch._dynamo.reset()
        close(torch.compile(q)(X), q(X), 0.01)


@pytest.mark.skipif(not _half.has_kernels(torch.bfloat16), reason="oneDNN has no bfloat16 here")
def test_any_batch() -> None:
    model, batch = net(), torch.export.Dim.DYNAMIC
    q = quantize(model, bf16(), example_inputs=(X,), dynamic_shapes=({0: batch},), backend="inductor")
    for size in (1, 3, 9):
        x = torch.randn(size, 3, 8, 8)
        close(q(x), model(x))


# -------------------------------------------------------------------------------------------------------- what is said
def test_local_settings() -> None:
    config = bf16().set_local("fc", MixedPrecisionConfig(dtype="fp32"))
    config.set_local(nn.Conv2d, MixedPrecisionConfig(dtype="fp32"))
    q = convert(net(), config, example_inputs=(X,))
    assert set(dtypes(q).values()) == {torch.bfloat16, torch.float32}
    assert [k for k, v in dtypes(q).items() if v == torch.bfloat16] == ["head"]
    chosen = bf16().set_local(lambda op: op.name == "head", MixedPrecisionConfig(dtype="fp32"))
    assert [k for k, v in dtypes(convert(net(), chosen, example_inputs=(X,))).items() if v == torch.float32] == ["head"]
    layers = convert(net(), bf16().set_local("fc", MixedPrecisionConfig(dtype="fp32")))
    assert type(layers.fc) is nn.Linear and type(layers.head) is not nn.Linear


@pytest.mark.parametrize("key", [nn.GELU, "1", nn.functional.gelu, torch.ops.aten.gelu.default, "GELU"])
def test_an_activation_function_has_its_own_precision(key: Any) -> None:
    """In mixed precision an operator has its dtype by itself, so such a setting is not in vain; for codes it is."""
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    x = torch.randn(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = bf16().set_local(key, MixedPrecisionConfig(dtype="fp32"))
        q = convert(copy.deepcopy(model), config, example_inputs=(x,))
    assert [line.op for line in q.report.floats] == ["gelu"] and "kept float by" in q.report.floats[0].detail
    with pytest.warns(IncWarning, match="no effect by itself"):
        prepare(model, StaticQuantConfig().set_local(key, StaticQuantConfig(w_dtype="fp32")), example_inputs=(x,))


@pytest.mark.parametrize("example", [True, False])
def test_nothing_that_half_precision_suits(example: bool) -> None:
    kwargs: Any = {"example_inputs": (torch.randn(5, 2, 8),)} if example else {}
    why = "lstm: it rounds its state at every step" if example else "it has no Linear, Conv or Embedding"
    with pytest.raises(ConfigError, match=rf"^nothing in this model can compute in half precision \({why}\)"):
        convert(nn.LSTM(8, 8).eval(), bf16(), **kwargs)
    with pytest.raises(ConfigError, match=r"half precision \(softmax: a softmax divides by a sum of exponentials"):
        convert(nn.Softmax(-1).eval(), bf16(), example_inputs=(torch.randn(2, 8),))


def test_white_list() -> None:
    q = convert(net(), bf16(white_list=[nn.Linear]), example_inputs=(X,))
    assert [k for k, v in dtypes(q).items() if v == torch.bfloat16] == ["fc", "head"]


def test_formats_mixed_in_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_FP16", "1")
    q = convert(net(), bf16().set_local("head", MixedPrecisionConfig(dtype="fp16")), example_inputs=(X,))
    assert dtypes(q)["head"] == torch.float16 and dtypes(q)["fc"] == torch.bfloat16
    close(q(X), net()(X))


def _calibrated(config: Any, **kwargs: Any) -> Any:
    return quantize(net(), config, lambda m: m(X), example_inputs=(X,), **kwargs)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("swap", [False, True])
def test_with_int8(backend: str, swap: bool) -> None:
    """What is quantized stays so, whichever config is said first; the rest becomes half."""
    static = StaticQuantConfig().set_local("head", StaticQuantConfig(w_dtype="fp32"))
    with pytest.warns(IncWarning, match="two configs claim head"):  # float there, half here
        q = _calibrated(bf16() + static if swap else static + bf16(), backend=backend)
    head = next(n for n in q.graph.graph.nodes if n.name.startswith("linear") and val(n).dtype == torch.bfloat16)
    assert peek_meta(head)["half"] == "bfloat16" and list(dtypes(q).values()).count(torch.bfloat16) == 1
    close(q(X), net()(X), 0.1)


def test_an_excluded_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="INT8StaticQuantConfig excludes bf16"):
        prepare(net(), StaticQuantConfig(excluded_precisions=["bf16"]) + bf16(), example_inputs=(X,))


def test_a_local_setting_of_another_method() -> None:
    q = _calibrated(StaticQuantConfig().set_local("head", bf16()))
    assert dtypes(q)["head"] == torch.bfloat16
    layers = quantize(net(), StaticQuantConfig().set_local("head", bf16()), lambda m: m(X))
    close(layers(X), net()(X), 0.1)
    weights_only = convert(net(), RTNConfig(group_size=16) + bf16(), example_inputs=(X,))
    close(weights_only(X), net()(X), 0.4)


def test_autotune() -> None:
    tried: list[float] = []
    want = net()(X)

    def score(model: Callable[[Tensor], Tensor]) -> float:
        tried.append(float((model(X) - want).norm()))
        return float(tried[-1] < 1e-4)

    config = TuningConfig(config_set=[MixedPrecisionConfig(dtype=["bf16", "fp32"])])
    best = autotune(net(), config, score, example_inputs=(X,))
    assert best is not None and max(tried) > 1e-3
    torch.testing.assert_close(best(X), want)


# ------------------------------------------------------------------------------------------------ machines and mistakes
@pytest.mark.parametrize("example", [None, (X,)])
def test_a_machine_without_it(example: Any) -> None:
    with pytest.warns(PrecisionWarning, match=r"float32 is used in the place of fp16.*FORCE_FP16=1") as told:
        q = convert(net(), MixedPrecisionConfig(), example_inputs=example)
    assert sum(w.category is PrecisionWarning for w in told) == 1
    torch.testing.assert_close(q(X), net()(X))


def test_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_FP16", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        q = convert(net(), MixedPrecisionConfig(), example_inputs=(X,))
    assert set(dtypes(q).values()) == {torch.float16}
    close(q(X), net()(X))


def test_part_of_it_missing() -> None:
    """bfloat16 where it is asked for, float32 where float16 was."""
    with pytest.warns(PrecisionWarning):
        q = convert(net(), bf16().set_local("head", MixedPrecisionConfig()), example_inputs=(X,))
    assert dtypes(q)["head"] == torch.float32 and dtypes(q)["fc"] == torch.bfloat16


def test_what_machines_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_slow("bf16") is None and "avx512_fp16" in str(why_slow("fp16"))
    assert why_slow("fp16", "cuda:0") is None
    monkeypatch.setattr(CpuInfo, "fp16", True)
    assert why_slow("fp16") is None
    info = CpuInfo()
    monkeypatch.undo()
    info.__dict__["_flags"] = {"avx512f", "avx512_fp16"}
    assert info.fp16 and not info.bf16


def test_fp32_leaves_the_model() -> None:
    q = convert(net(), MixedPrecisionConfig(dtype="fp32"), example_inputs=(X,))
    torch.testing.assert_close(q(X), net()(X))
    reasons = {line.op: line.detail for line in q.report.floats}
    assert reasons["add"] == "its neighbours compute in float32" and "int8" not in str(q.report.floats)


def test_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match="'fp16', 'bf16', 'fp32'"):
        MixedPrecisionConfig(dtype="fp8")


@pytest.mark.parametrize("example", [None, (X.bfloat16(),)])
def test_a_model_that_is_half_already(example: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)).bfloat16().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="bfloat16, not float32"):
        convert(model, bf16(), example_inputs=example)
    assert all(type(m) is nn.Conv2d for m in (model[0], model[2]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_it_keeps_its_dtypes() -> None:
    q = convert(net(), bf16(), example_inputs=(X,), backend="eager")
    with pytest.raises(IncError, match="mixed precision"):
        q.double()
    close(q.to("cpu").eval()(X), net()(X))


# -------------------------------------------------------------------------------------- what half precision cannot hold
class Large(nn.Module):
    """A weight, a bias, a gain and a constant factor of a product beyond float16."""

    def __init__(self) -> None:
        super().__init__()
        self.weighty, self.biased, self.plain = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor([1e5, 1.0, 1.0, 1.0]))
        self.register_buffer("table", torch.eye(4) * 7e4)
        with torch.no_grad():
            self.weighty.weight[0, 0] = self.biased.bias[1] = -1e5

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.weighty(x) * self.gain, self.biased(x), x @ self.table.t()], -1)
        return self.plain(x) + torch.tanh(y * 1e-6).unflatten(-1, (3, 4)).sum(-2)


@pytest.mark.parametrize("example", [True, False])
def test_constants_beyond_the_format_stay_float32(monkeypatch: pytest.MonkeyPatch, example: bool) -> None:
    monkeypatch.setenv("FORCE_FP16", "1")
    torch.manual_seed(0)
    model, x = Large().eval(), torch.full((2, 4), 1e-3)
    kwargs: Any = {"example_inputs": (x,), "backend": "eager"} if example else {}
    q = convert(model, MixedPrecisionConfig(dtype="fp16"), **kwargs)
    close(q(x), model(x))
    assert [line.module for line in q.report.kernels] == ["plain"]
    reasons = {line.module: line.detail for line in q.report.floats if line.op == "linear"}
    assert "weight, which it reads, holds 100000, beyond float16" in reasons["weighty"]
    assert "bias, which it reads, holds 100000, beyond float16" in reasons["biased"]
    if example:
        said = [line.detail for line in q.report.floats]
        assert any("gain, which it reads, holds 100000" in text for text in said)
        assert any("table, which it reads, holds 70000" in text for text in said)
    else:
        assert type(q.weighty) is nn.Linear and type(q.plain) is not nn.Linear


def test_infinities_and_what_just_fits_are_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_FP16", "1")
    layer = nn.Linear(4, 4).eval()
    with torch.no_grad():
        layer.weight[0, 0], layer.bias[1] = 65504.0, float("-inf")
    x = torch.full((2, 4), 1e-3)
    q = convert(layer, MixedPrecisionConfig(dtype="fp16"), example_inputs=(x,))
    assert q.report.count("linear") == 1 and bool((q(x)[:, 1] == float("-inf")).all())
    torch.testing.assert_close(q(x), layer(x), rtol=2**-9, atol=2**-9)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_stored_mask_of_attention_saturates(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setenv("FORCE_FP16", "1")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)
            mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
            mask[0] = torch.finfo(torch.float32).min
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=self.mask)

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 2, 5, 8)
    q = convert(model, MixedPrecisionConfig(dtype=dtype), example_inputs=(x,), backend="eager")
    assert {line.op for line in q.report.kernels} == {"linear", "sdpa"}
    close(q(x)[..., 1:, :], model(x)[..., 1:, :])
    (stored,) = (t for t in q.graph.buffers() if t.shape == (5, 5))
    assert bool(stored[0].isfinite().all()) and bool(stored[1, 2:].isinf().all())  # all is masked in the first row


# --------------------------------------------------------------------------------------------------------- tied weights
class Tied(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fc(self.table(ids)))


class Twins(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=bias), nn.Linear(64, 64, bias=bias)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [Tied, Twins])
def test_tied_weights_are_kept_once_layer_by_layer(kind: Any, bias: bool, backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind(bias).eval()
    x = torch.arange(6).reshape(2, 3) if kind is Tied else torch.randn(2, 64)
    q = convert(copy.deepcopy(model), bf16(), backend=backend)
    close(q(x), model(x), 0.05)
    whole = convert(model, bf16(), example_inputs=(x,), backend=backend)
    assert attribute_bytes(q) <= attribute_bytes(whole) < (0.8 if kind is Tied else 0.52) * attribute_bytes(model)
    assert not any("twice" in note for note in q.report.notes)
    q.save(tmp_path / "q")
    stored = sum(f.stat().st_size for f in (tmp_path / "q").rglob("*.safetensors"))
    assert stored < attribute_bytes(model) / 2 + 512  # and the header
    again = load(tmp_path / "q", original_model=kind(bias))
    assert attribute_bytes(again) == attribute_bytes(q) and torch.equal(again(x), q(x))


def test_tied_weights_in_two_formats_are_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_FP16", "1")
    q = convert(Twins(True).eval(), bf16().set_local("b", MixedPrecisionConfig(dtype="fp16")), backend="eager")
    assert any("twice" in note for note in q.report.notes)


# ----------------------------------------------------------------------------------------------- every layer is float32
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_model_that_stayed_float32_is_saved_layer_by_layer(dtype: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        q = convert(net(), MixedPrecisionConfig(dtype=dtype), backend="eager")
    assert q.report.backend == "eager" and not q.report.kernels
    assert convert(net(), MixedPrecisionConfig(dtype="fp32"), example_inputs=(X,), backend="eager").backend == "eager"
    q.save(tmp_path / "q")
    other = net()
    with torch.no_grad():
        other.fc.weight.zero_()
    again = load(tmp_path / "q", original_model=other)
    assert type(again) is Net and torch.equal(again(X), q(X)) and again.report.backend == "eager"
    assert again.report.floats == q.report.floats
    again.save(tmp_path / "again")  # what was loaded is saved again
    assert torch.equal(load(tmp_path / "again", original_model=net())(X), q(X))
    with pytest.raises(IncError, match="only a converted model can be saved"):
        save(net(), tmp_path / "float")
    with pytest.raises(IncError, match="only a converted model can be saved"):
        save(prepare(net(), MixedPrecisionConfig(dtype="fp32")), tmp_path / "prepared")


@pytest.mark.skipif(not _half.has_kernels(torch.bfloat16), reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear(768, 2), nn.Linear(300, 7), nn.Conv2d(256, 256, 3, groups=128)], ids=str)
def test_a_layout_that_pads_too_much_is_not_used(layer: nn.Module, exported: bool) -> None:
    x = torch.randn(4, 768 if layer.weight.shape[1] == 768 else 300) if isinstance(layer, nn.Linear) else None
    x = torch.randn(1, 256, 6, 6) if x is None else x
    model = nn.Sequential(layer).eval()
    bytes_before = sum(p.nbytes for p in model.parameters())
    want = copy.deepcopy(model).bfloat16()(x.bfloat16()).float()
    q = convert(export(model, (x,)) if exported else model, bf16())
    assert q.report.bytes_after <= 0.55 * bytes_before
    torch.testing.assert_close(q(x), want, rtol=2**-7, atol=2**-7)
