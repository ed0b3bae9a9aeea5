"""The same bar for models that nobody tuned for: each runs quantized, close to float, and the report hides nothing.

Weights are random (seeded) and models small, so the bound on the signal-to-noise ratio is that of the arithmetic, not
of a training: 8 bits over a range that fits give 40 to 45 dB for one layer (6.02 dB a bit, less the peak-to-rms ratio
of the data), and n layers in a row add their noise, some 10 log10(n) dB. 36 to 49 dB are measured here; 33 are asked
for. A wrong scale, a lost bias or a swapped axis gives 0 to 15.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inc_graph.quantization import StaticQuantConfig, convert, prepare
from tests.other_models import check, ids, kernels, rand, sqnr

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------- recurrent
class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 32)
        self.inp = nn.Linear(32, 32)
        self.rnn = kind(32, 32, batch_first=True, **options)
        self.out = nn.Linear(32 * (2 if options.get("bidirectional") else 1), 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rnn(torch.relu(self.inp(self.emb(ids))))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep"])
def test_recurrent(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    q = check(Recurrent(kind, **options), lambda: (torch.randint(50, (4, 12)),), {"embedding": 1, "linear": 2})
    (line,) = [x for x in q.report.floats if x.module == "rnn"]
    assert line.op == kind.__name__.lower() and "recurrent state" in line.detail


class Cell(nn.Module):
    """A loop over time in Python: unrolled by the exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 16)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.out(h)


def test_lstm_cell_in_a_loop() -> None:
    q = check(Cell(), rand(4, 3, 16), {"linear": 1})
    assert {x.op for x in q.report.floats if x.module == "cell"} >= {"lstm_cell"}


# -------------------------------------------------------------------------------------------------- convolutions
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int) -> None:
    conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
    model = nn.Sequential(
        conv(4, 16, 3, padding=1), nn.ReLU(), conv(16, 16, 3, stride=2, padding=1, groups=4), nn.ReLU(),
        up(16, 8, 2, stride=2), nn.ReLU(), conv(8, 4, 3, dilation=2, padding="same"),
        up(4, 4, 3, padding=1, bias=False),
    )  # fmt: skip
    check(model, rand(2, 4, *(8,) * dims), {f"conv{dims}d": 3, f"conv_transpose{dims}d": 2})


def test_grouped_transposed_convolution_stays_float() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2))
    q = check(model, rand(2, 4, 8, 8), {"conv2d": 1})
    assert [x.detail for x in q.report.floats] == [
        "grouped transposed convolution: its output channels lie on two weight dimensions"
    ]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = self.block(3, 16)
        self.down2 = self.block(16, 32)
        self.mid = self.block(32, 32)
        self.up2 = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.dec2 = self.block(64, 16)
        self.dec1 = self.block(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    @staticmethod
    def block(n: int, m: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
            nn.Conv2d(m, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.mid(F.max_pool2d(b, 2))
        d = self.dec2(torch.cat([self.up2(c), b], 1))
        e = self.dec1(torch.cat([F.interpolate(d, scale_factor=2, mode="nearest"), a], 1))
        return self.head(e)


def test_unet() -> None:
    q = check(UNet(), rand(1, 3, 16, 16), {"conv2d": 11, "conv_transpose2d": 1})
    assert not any(x.op == "cat" for x in q.report.floats)


class BasicBlock(nn.Module):
    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m)
        self.conv2, self.bn2 = nn.Conv2d(m, m, 3, 1, 1, bias=False), nn.BatchNorm2d(m)
        self.down = (
            nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m)) if stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += self.down(x)
        return F.relu(y)


def test_resnet() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), BasicBlock(16, 16, 1), BasicBlock(16, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    q = check(model, rand(2, 3, 16, 16), {"conv2d": 6, "linear": 1})
    assert sum(x.op == "add" for x in q.report.kernels) >= 1


class SqueezeExcite(nn.Module):
    def __init__(self, n: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(n, n // 4, 1), nn.Conv2d(n // 4, n, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(F.relu(self.reduce(x.mean([2, 3], keepdim=True)))))


class MBConv(nn.Module):
    """Inverted residual with squeeze-excitation: MobileNetV3 (hardswish, hardsigmoid), EfficientNet (silu, sigmoid)."""

    def __init__(self, n: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        m = 4 * n
        self.body = nn.Sequential(
            nn.Conv2d(n, m, 1, bias=False), nn.BatchNorm2d(m), act(),
            nn.Conv2d(m, m, 5, padding=2, groups=m, bias=False), nn.BatchNorm2d(m), act(),
            SqueezeExcite(m, gate()), nn.Conv2d(m, n, 1, bias=False), nn.BatchNorm2d(n),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@pytest.mark.parametrize(
    "names", [("Hardswish", "Hardsigmoid"), ("SiLU", "Sigmoid")], ids=["mobilenet", "efficientnet"]
)
def test_inverted_residual(names: tuple[str, str]) -> None:
    act, gate = (getattr(nn, n) for n in names)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), act(), MBConv(8, act, gate), MBConv(8, act, gate))
    check(model, rand(2, 3, 16, 16), {"conv2d": 11})


def test_group_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.PReLU(), nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    q = check(model, rand(2, 3, 8, 8), {"conv2d": 3})
    assert any("group_norm" in x.op for x in q.report.floats)


# ---------------------------------------------------------------------------------------------------- other habits
class Branching(nn.Module):
    """Control flow on values: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.small, self.large = nn.Linear(8, 1), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate(x).mean() > 0:
            return self.large(x)
        return self.small(x)


def test_control_flow_is_quantized_layer_by_layer() -> None:
    model = Branching().eval()
    with pytest.warns(UserWarning) as caught:
        prepared = prepare(model, StaticQuantConfig(), inplace=False, example_inputs=torch.randn(4, 8))
    (text,) = [str(w.message) for w in caught if "layer by layer" in str(w.message)]
    assert "data-dependent" in text and "test_other_models.py" in text
    assert type(prepared) is Branching
    data = torch.randn(32, 4, 8)
    with torch.no_grad():
        for x in data:
            prepared(x)
        q = convert(prepared)
        same = [x for x in data if (model.gate(x).mean() > 0) == (q.gate(x).mean() > 0)]
        assert len(same) > 28 and all(sqnr(model(x), q(x)) > 30 for x in same)
    assert kernels(q.report) == {"linear": 3} and "layer by layer" in q.report.notes[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.emb(x))))


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_tied_weights(exported: bool) -> None:
    model = Tied()
    q = check(model, ids(40), {"embedding": 1, "linear": 2}, exported=exported)
    assert model.head.weight is model.emb.weight
    if exported:
        assert sum("head" in n or "emb" in n for n, _ in q.graph.named_buffers() if n.endswith("_q")) == 1


@dataclasses.dataclass
class Features:
    last: Tensor
    middle: list[Tensor]


pytree.register_dataclass(Features) if hasattr(pytree, "register_dataclass") else None


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))

    def forward(self, x: Tensor) -> dict[str, Any]:
        middle = []
        for stage in self.stages:
            x = F.relu(stage(x))
            middle.append(x)
        return {"last": x, "middle": middle, "size": x.shape[-1]}


def test_intermediate_features() -> None:
    q = check(Backbone(), rand(2, 3, 8, 8), {"conv2d": 3})
    out = q(torch.randn(2, 3, 8, 8))
    assert len(out["middle"]) == 3 and all(t.dtype == torch.float32 for t in out["middle"])


class Counter_(nn.Module):
    """Counts its calls, and keeps the last keys: buffers that the graph writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = self.out(torch.cat([y, self.cache], 1))
        self.calls += 1
        self.cache.copy_(y)
        return z


def test_mutated_buffers() -> None:
    model = Counter_().eval()
    prepared = prepare(model, StaticQuantConfig(), example_inputs=torch.randn(2, 8))
    data = torch.randn(6, 2, 8)
    with torch.no_grad():
        for x in data:
            prepared(x)
        assert int(model.calls) == 0, "calibration ran on the user's buffers"
        q, twin = convert(prepared), convert(prepared)
        for m in (q, twin):  # a converted model has a state of its own
            ours = {n.rpartition(".")[2]: b for n, b in m.lowered.named_buffers()}
            ours["calls"].zero_(), ours["cache"].zero_()
        got, want = [q(x) for x in data], [model(x) for x in data]
        assert int(model.calls) == 6
        assert int({n.rpartition(".")[2]: b for n, b in q.lowered.named_buffers()}["calls"]) == 6
        assert int({n.rpartition(".")[2]: b for n, b in twin.lowered.named_buffers()}["calls"]) == 0
    assert all(sqnr(a, b) > 28 for a, b in zip(want, got, strict=True))
    assert kernels(q.report) == {"linear": 2}


class Regions(nn.Module):
    """A part without gradients and a part under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.a(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.gelu(self.b(x))
        return self.c(x.float())


@pytest.mark.parametrize("exported", [True, False], ids=["graph", "layers"])
def test_grad_and_autocast_regions(exported: bool) -> None:
    q = check(Regions(), rand(4, 16), {"linear": 3}, exported=exported)
    assert {x.module for x in q.report.kernels if x.op == "linear"} == {"a", "b", "c"}
