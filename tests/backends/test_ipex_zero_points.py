"""IPEX: weights with zero points, and recurrent layers in dynamic INT8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.quantization import DynamicQuantConfig, StaticQuantConfig, convert, prepare, quantize

pytestmark = pytest.mark.ipex


def sqnr(want: Tensor, got: Tensor) -> float:
    return float(20 * torch.log10(want.norm() / (want - got).norm()))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_asymmetric_weights_are_those_of_the_reference(kind: str, granularity: str) -> None:
    torch.manual_seed(0)
    model: nn.Module
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), torch.randn(32, 64)
    else:
        model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        for p in model.parameters():
            p += p.std()
    prepared = prepare(export(model.eval(), (x,)), StaticQuantConfig(w_sym=False, w_granularity=granularity))
    prepared(x)
    reference, q = convert(prepared, backend="eager"), convert(prepared, backend="ipex")
    assert sqnr(reference(x), q(x)) > 45
    in_groups = kind == "linear" and granularity == "per_tensor"
    assert (q.report.count("linear") == 2) == in_groups
    assert len(q.report.reference) == (0 if in_groups else 2)


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_run_as_on_inductor(kind: type[nn.LSTM], exported: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = kind(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.rnn(x)[0])
            return y

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(5, 2, 16)
    want = model(x)
    config = DynamicQuantConfig(act_granularity="per_token", w_granularity="per_channel")
    made = [quantize(export(model, (x,)) if exported else model, config, backend=b, inplace=False)
            for b in ("ipex", "inductor")]  # fmt: skip
    ours, other = made
    assert ours.report.backend == "ipex" and torch.equal(ours(x), other(x))
    assert ours.report.count(f"{kind.__name__.lower()}_steps") == 1 and sqnr(want, ours(x)) > 30
