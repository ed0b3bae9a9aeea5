"""Quantization-aware training as models and training loops use it: calls by name, layers at rest, averaged weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import CalibrationError, ConfigError, IncWarning, TrainingError
from inc_graph.quantization import MixedPrecisionConfig, convert, freeze_batch_norm, freeze_observers, prepare_qat

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.e, self.c = nn.Linear(8, 8), nn.Embedding(10, 8), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(input=x) + self.e(input=torch.arange(len(x))) + self.c(input=x[..., None])[..., 0]


def test_inputs_by_name() -> None:
    model = prepare_qat(ByName().train(), {"a|e|c": "INT8"})
    trained = model(X)
    trained.sum().backward()
    torch.testing.assert_close(convert(model)(X), trained, rtol=1e-4, atol=1e-4)
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 8)
    layer: Any = prepare_qat(nn.Sequential(conv1d).train(), {"0": "INT8"})[0]  # type: ignore[index]
    assert torch.equal(layer(x=X), layer(X))
    with pytest.raises(TypeError, match=r"Conv1D.forward\(\) needs one argument, 'x'"):
        layer(input=X)
    with pytest.raises(TypeError, match="needs one argument"):
        layer()


class Frozen(nn.Module):
    """A backbone, a head, and a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.back = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head, self.unused = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(x))


@pytest.mark.parametrize("learn_scales", [False, True])
def test_a_layer_that_is_never_called_does_not_hinder_freezing(learn_scales: bool) -> None:
    model: Any = prepare_qat(Frozen().train(), {nn.Linear: "INT8"}, learn_scales=learn_scales)
    with pytest.raises(CalibrationError, match="the input has no range yet"):
        freeze_observers(model)
    model(X)
    with pytest.warns(IncWarning, match="^no training batch has reached unused: not frozen") as said:
        freeze_observers(model)
    assert said[0].filename == __file__
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(3 * X)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model.unused(X)  # which may begin later
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_observers(model)


@pytest.mark.parametrize("options", [{}, {"learn_scales": True}, {"check_finite": False}])
def test_a_frozen_backbone_takes_its_first_range(options: dict[str, Any]) -> None:
    model: Any = prepare_qat(Frozen().train(), {nn.Linear: "INT8"}, **options)
    with pytest.raises(CalibrationError, match="the input has no range yet"):
        copy.deepcopy(model).eval()(X)  # nothing trains
    model.back.eval().requires_grad_(False)
    weight = model.back[0].weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(3):
        optimizer.zero_grad()
        model((1 + step) * X).square().mean().backward()
        optimizer.step()
        if not step:
            first = {n: b.clone() for n, b in model.back.state_dict().items()}
    assert all(torch.equal(b, first[n]) for n, b in model.back.state_dict().items())  # the first, and no other
    assert torch.equal(model.back[0].weight, weight) and model.back[0].fake_quant.input.seen == 1
    assert model.head.fake_quant.input.seen == (1 if "learn_scales" in options else 3)
    again = copy.deepcopy(model).eval()
    trained = again(X)
    with pytest.warns(match="stay float: unused"):
        converted = convert(again)
    assert [line.module for line in converted.report.quantized] == ["back.0", "back.2", "head"]
    torch.testing.assert_close(converted(X), trained, rtol=1e-4, atol=1e-4)


def test_a_refused_batch_gives_no_range() -> None:
    model: Any = prepare_qat(Frozen().train(), {nn.Linear: "INT8"})
    model.back.eval()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="the weight has 1 NaN"):
        model(X)
    assert not model.back[0].fake_quant.input.seen
    with pytest.raises(CalibrationError, match="the input has no range yet"):
        model.back(X)  # by itself


@pytest.mark.parametrize("example_inputs", [None, (X,)])
@pytest.mark.parametrize("learn_scales", [False, True])
def test_averages_of_weights_and_buffers(example_inputs: Any, learn_scales: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).train()
    options: dict[str, Any] = {"example_inputs": example_inputs, "learn_scales": learn_scales}
    model = prepare_qat(net, {nn.Linear: "INT8"}, **options)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(5):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        if step == 1:
            freeze_observers(model)
        if step >= 1:
            averaged.update_parameters(model)
    flags = ("frozen", "ready", "zero_point", "steps", "low", "high")  # equal in all that were averaged
    own, mean = dict(model.named_buffers()), dict(averaged.module.named_buffers())
    checked = [n for n in own if n.rpartition(".")[2] in flags]
    assert checked and all(torch.equal(own[n], mean[n]) for n in checked)
    steps = [p for n, p in averaged.module.named_parameters() if n.endswith(".step")]
    assert bool(steps) == learn_scales
    ranges = {n: mean[n].clone() for n in checked}
    before = copy.deepcopy(steps)
    averaged.module.train()(2 * X)
    assert all(torch.equal(b, ranges[n]) for n, b in averaged.module.named_buffers() if n in ranges)  # still frozen
    assert all(torch.equal(*both) for both in zip(steps, before, strict=True))
    averaged.eval()
    torch.testing.assert_close(convert(averaged.module)(X), averaged(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learn_scales", [False, True])
def test_checkpoints_of_before_hold_bools(learn_scales: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
        return prepare_qat(net, {nn.Linear: "INT8"}, example_inputs=(X,), learn_scales=learn_scales)

    model: Any = make()
    model(X)
    freeze_observers(model)
    freeze_batch_norm(model)
    flags = ("frozen", "ready")
    state = {n: b.bool() if n.rpartition(".")[2] in flags else b for n, b in model.state_dict().items()}
    assert any(b.dtype == torch.bool for b in state.values())
    again = make()
    again.load_state_dict(state)
    before = copy.deepcopy(dict(again.named_buffers()))
    assert torch.equal(again(3 * X), model(3 * X))
    assert all(torch.equal(b, before[n]) for n, b in again.named_buffers())


@pytest.mark.parametrize("example_inputs", [None, (X,)])
def test_half_precision_alone_is_nothing_to_train_for(example_inputs: Any) -> None:
    half = MixedPrecisionConfig("bf16")
    for mapping in (half, {nn.Linear: half}, {"head": half, "back": "fp32"}):
        with pytest.raises(ConfigError, match=r"^nothing is trained for in bf16 alone.*\n.*torch.autocast"):
            prepare_qat(Frozen().train(), mapping, example_inputs=example_inputs)
    model = prepare_qat(Frozen().train(), {nn.Linear: "INT8", "head": half}, example_inputs=example_inputs)
    model(X)
    lines = {line.module: line.detail for line in convert(model).report.kernels}
    assert "bfloat16" in lines["head"] and "int8" in lines["back.0"]
    with pytest.raises(ConfigError, match=r"can be trained \([^)]+"), pytest.warns(match="matched no operator"):
        prepare_qat(Frozen().train(), {"nothing": "INT8", nn.Linear: half}, example_inputs=example_inputs)
