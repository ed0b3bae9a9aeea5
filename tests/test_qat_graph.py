"""Quantization-aware training of a graph: batch norms, dropout and residual sums in both modes, and conversion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from inc_graph.errors import CalibrationError, CaptureError, ConfigError, TrainingError
from inc_graph.export import export
from inc_graph.quantization import (
    QuantizedModel,
    StaticQuantConfig,
    convert,
    freeze_batch_norm,
    freeze_observers,
    load,
    prepare_qat,
)
from inc_graph.verify import verify

W8A8 = StaticQuantConfig(reduce_range=False)
W4A4 = StaticQuantConfig(w_dtype="int4", act_dtype="uint4")


class Net(nn.Module):
    """A residual block with folded norms, a norm that cannot be folded, dropout, attention with dropout."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.bn3 = nn.BatchNorm2d(4)
        self.pre = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(p)
        self.q = nn.Linear(4, 8)
        self.head = nn.Linear(8, 5)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv(self.drop(x))))
        x = self.pre(torch.relu(self.bn3(self.up(x))))
        x = self.q(x.flatten(2).transpose(1, 2))
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.p if self.training else 0.0)
        return self.head(self.drop(x.mean(1)))


X = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 5


def make(p: float = 0.1) -> Net:
    torch.manual_seed(0)
    net = Net(p).train()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(-1.5, 1.5)
                m.running_var.uniform_(0.5, 2)
                m.running_mean.normal_()
    return net


def train(model: nn.Module, steps: int = 4, optimizer: Any = None) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("mapping", "options"),
    [
        (W8A8, {}),
        (W4A4, {}),
        (W4A4, {"learn_scales": True}),
        ({nn.Linear: "MXFP4", nn.Conv2d: "INT4"}, {}),
    ],
)
def test_converted_is_what_was_trained(mapping: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    parameters = dict(model.named_parameters())
    gm = prepare_qat(model, mapping, example_inputs=(X,), **options)
    assert isinstance(gm, fx.GraphModule) and gm.training
    assert all(gm.get_parameter(name) is p for name, p in parameters.items())
    verify(gm)
    losses = train(gm, 20)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in gm.parameters())
    with torch.no_grad():
        want = gm.eval()(X)
    q = convert(gm, backend="eager")
    assert isinstance(q, QuantizedModel)
    verify(q.graph)
    # one code of the last quantized input, times the largest weight of the head, is more than rounding can do
    assert float((q(X) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert {line.module for line in q.report.quantized} >= {"q", "head", "stem", "conv"}
    kernels = convert(gm)
    assert float((kernels(X) - want).abs().max()) <= 0.05 * float(want.abs().max())
    q.save(tmp_path / "q")
    assert torch.equal(load(tmp_path / "q")(X), q(X))


def test_without_rounding_it_is_the_float_model_in_both_modes() -> None:
    """16-bit weights alone: batch norms, folded or not, their statistics and gradients are those of torch."""
    model, twin = make(0.0), make(0.0)
    config = StaticQuantConfig(w_dtype="int8", act_dtype="fp32").set_local(nn.Conv2d, StaticQuantConfig(w_dtype="fp32"))
    gm = prepare_qat(model, config, example_inputs=(X,))
    for module in gm.modules():
        if hasattr(module, "rounded"):
            module.rounded = lambda x: x
    for mode in (True, True, False, True):
        gm.train(mode)
        twin.train(mode)
        a, b = gm(X), twin(X)
        assert torch.allclose(a, b, atol=1e-5)
        a.square().sum().backward()
        b.square().sum().backward()
    for name, p in twin.named_parameters():
        assert torch.allclose(gm.get_parameter(name).grad, p.grad, rtol=1e-3, atol=1e-4), name
    for name, value in twin.named_buffers():
        assert torch.allclose(gm.get_buffer(name), value, rtol=1e-5), name


def test_frozen_batch_norms_are_those_of_evaluation() -> None:
    gm = prepare_qat(make(0.0), W8A8, example_inputs=(X,))
    train(gm, 2)
    freeze_observers(gm)
    freeze_batch_norm(gm)
    before = {k: v.clone() for k, v in gm.state_dict().items() if "running" in k or k.endswith((".low", ".high"))}
    with torch.no_grad():
        assert torch.equal(gm.train()(X), gm.eval()(X))
    assert before and all(torch.equal(v, gm.state_dict()[k]) for k, v in before.items())


def test_dropout_is_random_in_training_only() -> None:
    gm = prepare_qat(make(0.5), W8A8, example_inputs=(X,))
    train(gm, 1)
    freeze_observers(gm)
    freeze_batch_norm(gm)
    with torch.no_grad():
        assert not torch.equal(gm(X), gm(X))
        gm.eval()
        assert torch.equal(gm(X), gm(X))


def test_one_mask_for_all_readers_of_a_dropout() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.drop(x)
            return y, self.fc(y)

    torch.manual_seed(0)
    model = Both().train()
    with torch.no_grad():
        model.fc.weight.copy_(torch.eye(4))
        model.fc.bias.zero_()
    gm = prepare_qat(model, W8A8, example_inputs=(torch.ones(64, 4),))
    dropped, through = gm(torch.ones(64, 4))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.allclose(dropped, through, atol=0.05)


def test_training_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    gm = prepare_qat(make(0.0), W4A4, example_inputs=(X,))
    optimizer = torch.optim.SGD(gm.parameters(), 0.01)
    train(gm, 2, optimizer)
    freeze_batch_norm(gm)
    save_file(gm.state_dict(), tmp_path / "model.safetensors")
    want = train(gm, 2, optimizer)
    again = prepare_qat(make(0.0), W4A4, example_inputs=(X,))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert train(again, 2, torch.optim.SGD(again.parameters(), 0.01)) == want


def test_a_float_checkpoint_goes_into_the_graph() -> None:
    other = make()
    with torch.no_grad():
        other.head.bias.fill_(3.0)
    gm = prepare_qat(make(), W8A8, example_inputs=(X,))
    gm.load_state_dict(other.state_dict())
    assert float(gm.get_parameter("head.bias").mean()) == 3.0


def test_the_model_or_a_copy() -> None:
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gm = prepare_qat(model, W8A8, inplace=False, example_inputs=(X,))
    train(gm, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    twin = copy.deepcopy(gm)
    train(twin, 1)
    first = convert(gm, backend="eager")
    train(gm, 2)  # the graph goes on learning, what was converted stays
    assert not torch.equal(first(X), convert(gm, backend="eager")(X))


def test_running_statistics_are_those_of_the_model() -> None:
    model = make()
    gm = prepare_qat(model, W8A8, example_inputs=(X,))
    train(gm, 2)
    state = gm.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert int(model.bn.num_batches_tracked) == 2 and gm.get_buffer("bn.running_mean") is model.bn.running_mean


def test_dynamic_batch() -> None:
    gm = prepare_qat(make(), W8A8, example_inputs=(X,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    gm(X[:5]).sum().backward()
    assert convert(gm)(X[:3]).shape == (3, 5)


def test_under_autocast_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    gm = prepare_qat(make(0.0), W8A8, example_inputs=(X,))
    with torch.autocast("cpu", torch.bfloat16):
        assert train(gm, 2)
    checkpoint(gm, X, use_reentrant=False).sum().backward()
    assert convert(gm)(X).isfinite().all()


def test_under_torch_compile() -> None:
    gm = prepare_qat(make(0.0), W8A8, example_inputs=(X,))
    twin = copy.deepcopy(gm)
    torch._dynamo.reset()
    compiled = torch.compile(gm, backend="aot_eager")
    for _ in range(2):
        compiled(X).square().sum().backward()
        twin(X).square().sum().backward()
    for (name, a), b in zip(gm.named_parameters(), twin.parameters(), strict=True):  # a last bit may change a code
        likeness = nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)
        assert a.grad.norm() < 1e-4 or float(likeness) > 0.98, name
    assert isinstance(convert(compiled), QuantizedModel)


# ---------------------------------------------------------------------------------------------------------- bad input
def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with pytest.raises(ConfigError, match="is in eval mode"):
        prepare_qat(model.eval(), W8A8, example_inputs=(X,))
    with pytest.raises(ConfigError, match="a graph keeps the mode"):
        prepare_qat(export(model, (X,)), W8A8, example_inputs=(X,))
    with pytest.raises(CaptureError, match="does not take the example inputs"):
        prepare_qat(model.train(), W8A8, example_inputs=(X, X))
    with pytest.raises(ConfigError, match="matches nothing that can be trained"), pytest.warns(match="matched no"):
        prepare_qat(model, {nn.LSTM: "INT8"}, example_inputs=(X,))
    with pytest.raises(ConfigError, match="they need example_inputs"):
        prepare_qat(model, W8A8, dynamic_shapes=({},))
    gm = prepare_qat(model, W8A8, example_inputs=(X,))
    with pytest.raises(ConfigError, match="prepared for training already"):
        prepare_qat(gm, W8A8)
    with pytest.raises(CalibrationError, match=r"seen no training batch\n.*train it first"):
        convert(gm)
    with pytest.raises(CalibrationError, match="the input has no range yet"):
        gm.eval()(X)
    train(gm.train(), 1)
    q = convert(gm)
    with pytest.raises(ConfigError, match="converted already"):
        prepare_qat(q)
    with pytest.raises(ConfigError, match="converted already"):
        convert(q)
    with pytest.raises(ConfigError, match="is no graph"):
        freeze_batch_norm(make())


def test_a_norm_without_momentum_is_named() -> None:
    model = make()
    model.bn2.momentum = None
    with pytest.raises(ConfigError, match=r"momentum=None.*'bn2'.*\n.*leave out example_inputs"):
        prepare_qat(model, W8A8, example_inputs=(X,))


def test_random_operators_that_are_not_known() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + torch.rand_like(x) if self.training else x)

    with pytest.raises(ConfigError, match=r"rand.* is random.*\n.*leave out the example inputs"):
        prepare_qat(Noisy().train(), W8A8, example_inputs=(torch.ones(2, 4),))


def test_what_is_not_finite_is_named() -> None:
    gm = prepare_qat(make(0.0), W8A8, example_inputs=(X,))
    train(gm, 1)
    with pytest.raises(TrainingError, match=r"the input has \d+ NaN .*'stem'"):
        gm(X * torch.nan)
    with pytest.raises(TrainingError, match=r"gradient .* the model's output"):
        (gm(X).sum() * torch.inf).backward()
    with torch.no_grad():
        gm.get_parameter("conv.weight")[0] = torch.inf
    with pytest.raises(TrainingError, match=r"the weight has .*'conv'"):
        gm(X)
    with pytest.raises(TrainingError, match=r"the weight holds NaN or infinity.*'conv'"):
        convert(gm)
