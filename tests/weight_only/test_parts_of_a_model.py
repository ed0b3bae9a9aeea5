"""Calibration through a part of a model: blocks are rounded in sequence whoever calls them, or a note says why not."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.quantization import GPTQConfig, convert, prepare
from tests.weight_only.sequence_models import WIDTH, Net, data, made, quietly


class Whole(nn.Module):
    """Blocks in a body, as transformers has them, and a head behind the body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Net(3), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if getattr(m, "quantized", False)}


def through(way: str, **kwargs: Any) -> Any:
    prepared = prepare(made(Whole), GPTQConfig(group_size=16, bits=3, **kwargs))
    for x in data():
        if way == "whole":
            prepared(x)
        elif way == "body":
            prepared.body(x)
        else:
            for block in prepared.body.blocks:
                x = block(x)
            prepared.head(x)
    return quietly(prepared)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_blocks_are_the_same_whoever_calls_them(true_sequential: bool) -> None:
    whole, body = through("whole", true_sequential=true_sequential), through("body", true_sequential=true_sequential)
    a, b = weights(whole), weights(body)
    assert {n for n in a if n.startswith("body")} == b.keys() and len(b) == 9
    assert all(torch.equal(a[n], b[n]) for n in b)
    assert not any("float model" in note for note in body.report.notes)


def test_a_part_gives_what_the_float_model_gives() -> None:
    prepared = prepare(made(Whole), GPTQConfig(group_size=16, bits=3))
    with torch.no_grad():
        for x in data():
            y = prepared.body(x)
            assert torch.equal(y, made(Whole).body(x))
            prepared.head(y)
    model = quietly(prepared)
    assert len(weights(model)) == 10


def test_blocks_that_are_called_one_by_one_are_rounded_in_float_and_the_report_says_so() -> None:
    notes = [n for n in through("blocks", true_sequential=True).report.notes if "float model" in n]
    assert len(notes) == 1
    assert "body.blocks.0" in notes[0] and "not called" in notes[0] and "true_sequential=True had no effect" in notes[0]


def test_calls_of_the_model_and_of_its_part_are_one_row_of_batches() -> None:
    prepared = prepare(made(Whole), GPTQConfig(group_size=16, bits=3))
    for i, x in enumerate(data()):
        (prepared.body if i % 2 else prepared)(x)
    a, b = weights(quietly(prepared)), weights(through("whole"))
    assert all(torch.equal(a[n], b[n]) for n in b if n.startswith("body"))


def test_what_blocks_see_outside_of_calls_is_not_used_and_the_report_says_so() -> None:
    prepared = prepare(made(Whole), GPTQConfig(group_size=16, bits=3))
    for x in data():
        prepared(x)
        prepared.body.blocks[1](10 * x)
    model = quietly(prepared)
    a, b = weights(model), weights(through("whole"))
    assert all(torch.equal(a[n], b[n]) for n in b)
    notes = [n for n in model.report.notes if "not used" in n]
    assert len(notes) == 1 and "3 layers" in notes[0] and "body.blocks.1.q" in notes[0]
    assert not any("not used" in n for n in through("whole").report.notes)


def test_a_copy_and_the_model_after_it_have_their_own_forwards() -> None:
    prepared = prepare(made(Whole), GPTQConfig(group_size=16, bits=3))
    other = copy.deepcopy(prepared)
    for x in data():
        other.body(x)
    with pytest.raises(Exception, match="no calibration data"):
        convert(prepared)
    model = quietly(other)
    assert not any("forward" in vars(m) for m in (model, model.body))
    assert torch.isfinite(model(data()[0])).all()


def test_threads_may_call_parts_at_once() -> None:
    prepared = prepare(made(Whole), GPTQConfig(group_size=16, bits=3))
    threads = [threading.Thread(target=prepared.body, args=(x,)) for x in data()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    a = weights(quietly(prepared))
    assert len(a) == 9
