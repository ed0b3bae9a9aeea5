"""What stands before the blocks of a model: they are calibrated on what it gives when it is rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.errors import CalibrationError
from inc_graph.quantization import GPTQConfig, RTNConfig, convert, prepare
from tests.weight_only.sequence_models import WIDTH, Net, data, made, quietly


class Reading(nn.Module):
    """A block that also reads what an encoder gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.own, self.other, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.own(self.norm(x))) * self.other(read))


class Both(nn.Module):
    """An encoder of two blocks, a decoder of four."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Net(2)
        self.decoder = nn.ModuleList(Reading() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        read, y = self.encoder(x), x.roll(1, 0)
        for block in self.decoder:
            y = block(y, read)
        return y


def config(**kwargs: Any) -> GPTQConfig:
    return GPTQConfig(group_size=16, bits=3, **kwargs)


def quantized(model: nn.Module, config: Any, batches: list[Tensor] | None = None) -> nn.Module:
    prepared = prepare(model, config)
    for x in data() if batches is None else batches:
        prepared(x)
    made: nn.Module = quietly(prepared, compute_dtype="float32")
    return made


def weights(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    found = {n: m for n, m in model.named_modules() if getattr(m, "quantized", False) and n.startswith(prefix)}
    return {n: m.weight.detach().clone() for n, m in found.items()}  # type: ignore[operator, union-attr]


def decoder_behind(encoder: nn.Module | None) -> dict[str, Tensor]:
    """The decoder quantized alone, behind the float encoder or behind one with the weights of another model."""
    model = made(Both)
    for name, value in ({} if encoder is None else weights(encoder, "encoder")).items():
        model.get_submodule(name).weight = nn.Parameter(value)
    return weights(quantized(model, config(white_list=["decoder"])), "decoder")


@pytest.mark.parametrize("kind", ["gptq", "rtn"])
def test_a_decoder_is_calibrated_on_the_rounded_encoder(kind: str) -> None:
    both = config() if kind == "gptq" else config().set_local("encoder", RTNConfig(bits=3, group_size=16))
    model = quantized(made(Both), both)
    got, behind, in_float = weights(model, "decoder"), decoder_behind(model), decoder_behind(None)
    assert len(got) == 12 and got.keys() == behind.keys() == in_float.keys()
    assert all(torch.equal(got[n], behind[n]) for n in got)
    assert not torch.equal(got["decoder.3.other"], in_float["decoder.3.other"])


def test_the_prepared_model_can_be_converted_again() -> None:
    prepared = prepare(made(Both), config())
    for x in data():
        prepared(x)
    one, two = (quietly(prepared, inplace=False) for _ in range(2))
    a, b = weights(one, "decoder"), weights(two, "decoder")
    assert a and all(torch.equal(a[n], b[n]) for n in a)


def test_one_layer_before_the_blocks_is_exact_and_two_are_noted() -> None:
    class Projected(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.project = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count)))
            self.net = Net(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(self.project(x))
            return y

    for count in (1, 2):
        model = quantized(made(Projected, count=count), config(true_sequential=True))
        notes = [n for n in model.report.notes if "float model" in n]  # type: ignore[union-attr, operator]
        assert len(notes) == count - 1
        assert all("2 layers before" in n and "project.0" in n and "true_sequential=True" in n for n in notes)


def test_a_rounded_layer_before_the_blocks_that_gives_no_numbers_is_named_by_its_call() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.net = nn.Linear(WIDTH, WIDTH, bias=False), Net(2)
            with torch.no_grad():
                self.project.weight.zero_()
                self.project.weight[:, 0], self.project.weight[:, 1] = 1.0, 1e-3

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(self.project(x).log())
            return y

    good, bad = torch.zeros(40, WIDTH), torch.zeros(40, WIDTH)
    good[:, 0] = 1.0
    bad[:, 1] = 1.0  # read by a weight that rounds to zero
    prepared = prepare(made(Log), config())
    prepared(good)
    prepared(bad)
    with pytest.raises(CalibrationError, match="calibration batch 2"):
        convert(prepared)
