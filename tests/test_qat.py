"""Quantization-aware training layer by layer: what is trained, what goes on from there, and what is refused."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inc_graph.errors import CalibrationError, ConfigError, IncError, TrainingError, UnusedRuleWarning
from inc_graph.fake_quantizer import OwnScale, TrackedRange
from inc_graph.learned_step import LearnedStep
from inc_graph.numerics import choose_qparams, fake_quantize
from inc_graph.ops import is_choose_qparams, is_dequantize, is_quantize
from inc_graph.quantization import (
    DynamicQuantConfig,
    GPTQConfig,
    RTNConfig,
    SmoothQuantConfig,
    StaticQuantConfig,
    convert,
    freeze_observers,
    load,
    prepare,
    prepare_qat,
)

MAPPINGS: dict[str, Any] = {
    "default": None,
    "mxfp4": {nn.Linear: "MXFP4"},
    "mxfp6": {nn.Linear: "MXFP6"},
    "mxint8": {nn.Linear: "mxint8"},
    "int8": {nn.Linear: "INT8"},
    "int4": {nn.Linear: "INT4"},
    "fp8": {nn.Linear: "fp8_e4m3"},
    "conv": {nn.Conv2d: "INT4", nn.Linear: "MXFP8"},
    "static": StaticQuantConfig(w_dtype="int4", act_dtype="uint4"),
    "rtn": {"fc": RTNConfig(bits=4, group_size=32), "head": "MXFP8"},
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in MAPPINGS]
OPTIONS += [("int4", {"learn_scales": True}), ("static", {"learn_scales": True})]


class Net(nn.Module):
    """An image through a convolution and an MLP with a residual; 9 inputs are fewer than a block of MX formats."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc1 = nn.Linear(8 * 16, 48)
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Linear(48, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        x = self.drop(nn.functional.gelu(self.fc1(x)))
        return self.head(self.fc2(x))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().train()


X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 5


def train(model: nn.Module, steps: int = 8, optimizer: Any = None, rate: float = 3e-3) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_converted_is_what_was_trained(model: Net, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Levels, report, saving; and the values of the eager reference, bit for bit, of every format."""
    float_keys, classes = set(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    assert prepare_qat(model, MAPPINGS[name], **options) is model
    assert {n: type(m) for n, m in model.named_modules() if n in classes} == classes
    assert all(model.get_parameter(n) is p for n, p in parameters.items())
    assert float_keys <= set(model.state_dict())
    losses = train(model, 12)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = model.eval()(X)
    q = convert(model, inplace=False, backend="eager")
    assert torch.equal(q(X), want)
    assert {line.module for line in q.report.quantized} >= {"fc1", "fc2", "head"}
    if name not in ("mxfp4", "int8", "static"):
        return
    q.save(tmp_path / "q")
    assert torch.allclose(load(tmp_path / "q", Net().eval())(X), want, atol=2e-3)  # on the kernels of the machine


def test_the_graph_of_an_mx_layer(model: Net) -> None:
    q = convert(prepare_qat(model, {nn.Linear: "MXFP4"}))
    graph = q.fc1.inner.graph
    kinds = [sum(f(n) for n in graph.graph.nodes) for f in (is_choose_qparams, is_quantize, is_dequantize)]
    assert kinds == [1, 1, 2]
    assert all(n.args[3] == [1, 32] for n in graph.graph.nodes if is_dequantize(n))


def test_forward_and_gradient_of_an_mx_layer() -> None:
    """By hand: both operands rounded by their blocks of 32, gradients as if they had not been."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 7)
    x = torch.randn(5, 40, requires_grad=True)
    rounded = [
        fake_quantize(t.detach(), choose_qparams(t.detach(), (1, 32), "mxfp4")[0], None, (1, 32), "mxfp4")
        for t in (x, layer.weight)
    ]
    prepare_qat(layer, {nn.Linear: "MXFP4"})
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(*rounded, layer.bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(x.grad, grad @ rounded[1])
    assert torch.equal(layer.weight.grad, grad.t() @ rounded[0])


def test_tracked_range_is_the_mean_of_its_batches_and_can_be_frozen(model: Net) -> None:
    layer = nn.Linear(4, 3)
    prepare_qat(layer, {nn.Linear: "INT8"}, freeze_after=3)
    range_of = layer.fake_quant.input
    assert isinstance(range_of, TrackedRange) and isinstance(layer.fake_quant.weight, OwnScale)
    batches = [torch.full((2, 4), float(k)) for k in (1, 2, 6, 100)]
    for x in batches:
        layer(x)
    assert range_of.seen == 3 and float(range_of.high) == pytest.approx(3)
    layer.eval()
    layer(torch.full((2, 4), 1e6))
    assert float(range_of.high) == pytest.approx(3)

    prepare_qat(model, {nn.Linear: "INT8"})
    with pytest.raises(CalibrationError, match=r"no range yet.*'fc1'"):
        freeze_observers(model)
    train(model, 1)
    freeze_observers(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if "fake_quant" in k}
    train(model, 2)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_learned_steps_are_trained_and_begin_as_the_paper_says() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 3)
    prepare_qat(layer, StaticQuantConfig(w_dtype="int4", act_dtype="int4", act_sym=True), learn_scales=True)
    step = layer.fake_quant.weight.step
    assert isinstance(layer.fake_quant.weight, LearnedStep) and step.shape == (3, 1)
    assert torch.allclose(step, 2 * layer.weight.abs().mean(1, keepdim=True) / 7**0.5)
    x = torch.randn(6, 16)
    layer(x).square().sum().backward()
    assert layer.fake_quant.input.step.item() == pytest.approx(2 * x.abs().mean().item() / 7**0.5, rel=1e-6)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in layer.parameters())
    # equation 3 and section 2.2 of LSQ, written out
    w, s = layer.weight.detach(), step.detach()
    ratio = w / s
    inside = (ratio.round() >= -8) & (ratio.round() <= 7)
    slope = torch.where(inside, ratio.round() - ratio, ratio.round().clamp(-8, 7))
    xq = layer.fake_quant.input.eval()(x).detach()
    wq = layer.fake_quant.weight.eval()(w).detach()
    grad_w = (2 * nn.functional.linear(xq, wq, layer.bias.detach())).t() @ xq
    assert torch.allclose(step.grad, (grad_w * slope).sum(1, keepdim=True) / (16 * 7) ** 0.5, rtol=1e-4)
    freeze_observers(layer)
    assert not step.requires_grad


def test_an_optimizer_from_before_goes_on(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    train(model, 3, optimizer)
    prepare_qat(model, {nn.Linear: "MXFP8"})
    before = model.fc1.weight.detach().clone()
    train(model, 3, optimizer)
    assert not torch.equal(before, model.fc1.weight)


@pytest.mark.parametrize("options", [{}, {"learn_scales": True}])
def test_training_resumes_from_a_checkpoint(model: Net, options: dict[str, Any], tmp_path: Path) -> None:
    mapping = {nn.Linear: "INT4"}
    prepare_qat(model, mapping, **options)
    model.drop.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    train(model, 3, optimizer)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    states = copy.deepcopy(optimizer.state_dict())
    want = train(model, 3, optimizer)

    torch.manual_seed(5)
    again = prepare_qat(Net().train(), mapping, **options)
    again.drop.p = 0.0
    optimizer = torch.optim.AdamW(again.parameters(), 3e-3)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    optimizer.load_state_dict(states)
    assert train(again, 3, optimizer) == want


def test_a_pickled_model_goes_on(model: Net) -> None:
    prepare_qat(model, {nn.Linear: "INT4"}, learn_scales=True)
    model.drop.p = 0.0
    train(model, 2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.fc1.forward.args[0] is again.fc1
    assert train(again, 2) == train(model, 2)
    with pytest.raises(TrainingError, match=r"NaN .*'fc1'"):
        again(X * torch.nan)
    assert convert(again).report.quantized


def test_a_float_checkpoint_goes_into_a_prepared_model(model: Net) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    prepare_qat(model, {nn.Linear: "INT4"})
    model.load_state_dict(state)  # strict
    other = prepare_qat(Net().train(), {nn.Linear: "MXFP8"})
    other.load_state_dict(state)
    assert set(other.state_dict()) == set(state)


def test_what_a_mapping_speaks_of(model: Net) -> None:
    def wide(op: Any) -> bool:
        return bool(op.weight_shape[0] > 20)

    prepare_qat(model, {wide: "MXFP4", "fc2$": "INT8", "head": None})
    trained = {n: m.fake_quant.weight.spec.qtype for n, m in model.named_modules() if hasattr(m, "fake_quant")}
    assert trained == {"fc1": "mxfp4", "fc2": "int8"}
    train(model, 1)
    reasons = {line.module: line.detail for line in convert(model).report.floats}
    assert reasons["head"] == "kept float by mapping['head']"

    with pytest.warns(UnusedRuleWarning, match=r"mapping\['nothing'\] matched no operator"):
        prepare_qat(Net().train(), {nn.Linear: "INT8", "nothing": "INT4"})


def test_the_model_itself_or_a_copy(model: Net) -> None:
    state = set(model.state_dict())
    q = prepare_qat(model, {nn.Linear: "INT4"}, inplace=False)
    assert q is not model and type(q) is Net and set(model.state_dict()) == state and "forward" not in vars(model.fc1)
    assert q.fc1.weight is not model.fc1.weight
    train(q, 2)
    twin = copy.deepcopy(q)
    train(twin, 2)
    assert twin.fc1.fake_quant.input.seen == 4 and q.fc1.fake_quant.input.seen == 2


def test_transformer_layers_do_not_take_their_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        want = layer.eval()(x)
        prepare_qat(layer.train(), {nn.Linear: "MXFP4"})
        have = layer.eval()(x)
    assert float((have - want).abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------ with the tools of training
def test_under_autocast(model: Net) -> None:
    prepare_qat(model, {nn.Linear: "MXFP8", nn.Conv2d: "INT8"})
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, 6)
    assert losses[-1] < losses[0] and model.fc1.weight.dtype == torch.float32


@pytest.mark.parametrize("mapping", [{nn.Linear: "INT4"}, {nn.Linear: "MXFP4"}])
def test_under_gradient_checkpointing(model: Net, mapping: Any) -> None:
    """The repeated forward changes neither the ranges nor the gradients."""
    from torch.utils.checkpoint import checkpoint

    model.drop.p = 0.0
    prepare_qat(model, mapping)
    twin = copy.deepcopy(model)
    for _ in range(2):
        twin(X).square().sum().backward()
        checkpoint(model, X, use_reentrant=False).square().sum().backward()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("mapping", [{nn.Linear: "INT4"}, {nn.Linear: "MXFP4"}])
def test_under_torch_compile(model: Net, mapping: Any) -> None:
    model.drop.p = 0.0
    prepare_qat(model, mapping)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(X).square().sum().backward()
        twin(X).square().sum().backward()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(a, b), name
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert not bool(compiled(X * torch.nan).isfinite().any())  # shown, not turned into numbers
    assert isinstance(convert(compiled), Net)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("example_inputs", [None, (X,)], ids=["layers", "graph"])
def test_learned_steps_under_torch_compile(model: Net, example_inputs: Any, bad: bool) -> None:
    """They begin with the first batch there as well, of what is finite in it, and learn the same."""
    model.drop.p = 0.0
    prepared = prepare_qat(model, MAPPINGS["int4"], learn_scales=True, example_inputs=example_inputs)
    twin = copy.deepcopy(prepared)
    torch._dynamo.reset()
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
    if bad:
        assert not bool(compiled(torch.full_like(X, torch.inf)).isfinite().all())
        states = (v for k, v in prepared.state_dict().items() if k.endswith(".step"))
        assert all(bool(v.isfinite().all()) for v in states)
        return
    assert train(compiled, 4) == pytest.approx(train(twin, 4), rel=1e-4)
    steps = {k: v for k, v in prepared.state_dict().items() if k.endswith(".step")}
    assert len(steps) == 6 and all(torch.allclose(v, twin.state_dict()[k], rtol=1e-4) for k, v in steps.items())
    assert convert(compiled).report.quantized


# ---------------------------------------------------------------------------------------------------------- bad input
def _unchanged(model: nn.Module) -> bool:
    return not any("fake_quant" in m._modules or "forward" in vars(m) for m in model.modules())


def test_refused_models(model: Net) -> None:
    with pytest.raises(ConfigError, match=r"Net\) is in eval mode\n.*model.train\(\)"):
        prepare_qat(model.eval())
    assert _unchanged(model)
    prepare_qat(model.train())
    with pytest.raises(ConfigError, match="prepared for training already"):
        prepare_qat(model)
    with pytest.raises(ConfigError, match="prepared for training already"):
        prepare(model.eval(), StaticQuantConfig())
    convert(model)
    with pytest.raises(ConfigError, match="converted already"):
        prepare_qat(model)
    with pytest.raises(ConfigError, match="converted already"):
        convert(model)
    with pytest.raises(IncError, match="got the class Net"):
        prepare_qat(Net)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not prepared for training"):
        freeze_observers(Net())


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({nn.Linear: "MXFP5"}, r"mapping\[Linear\]: no format 'MXFP5'.*\n.*MXFP8"),
        ({nn.Linear: "nf4"}, r"mapping\[Linear\]: the format 'nf4' alone.*\n.*RTNConfig"),
        ({nn.Linear: 8}, r"mapping\[Linear\] must be the name of a format or a config, not 8"),
        ({nn.LSTM: "INT8"}, "matches nothing that can be trained"),
        ({"nowhere": "INT8"}, "matches nothing that can be trained"),
        ({}, "the mapping is empty"),
        (["INT8"], "must be a dictionary or a config"),
        ({nn.Conv2d: "MXFP4"}, r"mxfp4 is for linear layers, not for convolutions \[module 'conv'\]"),
        ({"fc1": GPTQConfig()}, r"gptq.* rounds once, against calibration data \[module 'fc1'\]"),
    ],
)
def test_refused_mappings(model: Net, mapping: Any, message: str) -> None:
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=message):
        warnings.simplefilter("ignore", UnusedRuleWarning)
        prepare_qat(model, mapping)
    assert _unchanged(model)


@pytest.mark.parametrize("mapping", [SmoothQuantConfig(), {nn.Linear: SmoothQuantConfig()}])
@pytest.mark.parametrize("example_inputs", [None, (X,)], ids=["layers", "graph"])
def test_smoothing_is_refused(model: Net, mapping: Any, example_inputs: Any) -> None:
    with pytest.raises(ConfigError, match=r"SmoothQuant goes by calibration data.*\n.*StaticQuantConfig"):
        prepare_qat(model, mapping, example_inputs=example_inputs)
    assert _unchanged(model)


@pytest.mark.parametrize("options", [{"freeze_after": 0}, {"learn_scales": 1}, {"check_finite": None}])
def test_refused_options(model: Net, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        prepare_qat(model, None, **options)
    assert _unchanged(model)


def test_what_is_not_finite_is_named(model: Net) -> None:
    prepare_qat(model, {nn.Linear: "INT8"})
    train(model, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"the input has \d+ NaN and 0 infinite values \[module 'fc1'\]"):
        model(X * torch.nan)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    with pytest.raises(TrainingError, match=r"the model's output is not finite\n.*the loss"):
        (model(X).sum() * torch.inf).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"the weight has 1 NaN .*'fc2'"):
        model(X)
    with pytest.raises(TrainingError, match=r"the weight holds NaN.*'fc2'"):
        convert(model)
    assert "forward" in vars(model.fc1) and model.training


class Root(nn.Module):
    """A gradient that is infinite behind the first layer, and a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(self.norm(x)) * 0.0).abs().sqrt())


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("example_inputs", [None, (torch.ones(4, 6),)], ids=["layers", "graph"])
def test_what_is_refused_leaves_no_trace(example_inputs: Any, learn_scales: bool) -> None:
    torch.manual_seed(0)
    model = prepare_qat(Root().train(), {nn.Linear: "INT8"}, example_inputs=example_inputs, learn_scales=learn_scales)
    model = copy.deepcopy(model)
    x = torch.randn(4, 6)
    with torch.no_grad():
        value = model.get_parameter("last.weight")[0, 0].clone()
        model.get_parameter("last.weight")[0, 0] = torch.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"the weight has 1 NaN .*'last'"):
        model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "last.weight")
    with torch.no_grad():
        model.get_parameter("last.weight")[0, 0] = value
    with pytest.raises(TrainingError, match=r"gradient .* the model's output is not finite\n.*the loss"):
        (model(x).sum() * torch.nan).backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(TrainingError, match=r"gradient .* the layer is not finite \[module 'first'\]"):
        model(x).sum().backward()  # the slope of a root at 0
    assert all(p.grad is None for p in model.parameters())


def test_untrained_and_unreached(model: Net) -> None:
    prepare_qat(model, {nn.Linear: "INT8"})
    with pytest.raises(CalibrationError, match="seen no training batch"):
        convert(model)
    with pytest.raises(CalibrationError, match=r"no range yet.*'fc1'"):
        model.eval()(X)
    model.train().fc1(torch.randn(2, 128))
    with pytest.warns(match="layers saw no calibration data and stay float: fc2, head"):
        q = convert(model)
    assert [line.module for line in q.report.quantized] == ["fc1"]


def test_a_failed_conversion_changes_nothing(model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    from inc_graph.quantization import module_scope

    prepare_qat(model, {nn.Linear: "INT8"})
    train(model, 1)
    with torch.no_grad():
        want = copy.deepcopy(model).eval()(X)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(module_scope, "convert", broken)
        with pytest.raises(RuntimeError, match="broken"):
            convert(model)
    assert model.training and torch.equal(model.eval()(X), want)
    convert(model)


def test_a_dynamic_config_is_trained_with_the_scales_of_each_batch(model: Net) -> None:
    prepare_qat(model, DynamicQuantConfig())
    assert isinstance(model.fc1.fake_quant.input, OwnScale)
    train(model, 2)
    with torch.no_grad():
        want = model.eval()(X)
    assert torch.allclose(convert(model, backend="eager")(X), want, atol=1e-5)
