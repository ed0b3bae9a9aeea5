"""Weights that several layers share, when one of these layers or all of them are quantized."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inc_graph.quantization import RTNConfig, StaticQuantConfig, load, quantize, save
from tests.weight_only_models import SCOPES, Words, ids, quantized, tensors

BOTH = StaticQuantConfig(w_dtype="int4", act_dtype="fp32", bias_correction=False)


class TiedWords(Words):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.table.weight


@pytest.mark.parametrize("scope", SCOPES)
def test_tied_weights_of_which_one_is_quantized(scope: str) -> None:
    model = TiedWords().eval()
    q = quantized(scope, model=model)
    said = [n for n in q.report.notes if "stays float" in n]
    assert len(said) == 1 and "head shared its weight with table" in said[0]
    kept = [t for t in tensors(q).values() if t.shape == (24, 32) and t.is_floating_point()]
    assert len(kept) == 1 and torch.equal(kept[0], model.table.weight)


def test_a_layer_that_is_called_twice_has_one_line() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    (line,) = quantize(Twice().eval(), RTNConfig(), example_inputs=(torch.randn(2, 32),)).report.weights
    assert line.name == "layer" and line.bytes == 32 * 16 + 2 * 32


@pytest.mark.parametrize("scope", SCOPES)
def test_the_report_of_a_loaded_model_says_the_same(scope: str, tmp_path: Path) -> None:
    q = quantized(scope, model=TiedWords().eval())
    save(q, tmp_path)
    back = load(tmp_path, None if scope == "graph" else TiedWords().eval())
    assert q.report.weights and back.report.weights == q.report.weights
    assert q.report.notes and back.report.notes == q.report.notes
    assert str(back.report.weights) == str(q.report.weights)


def codes(model: nn.Module) -> set[int]:
    """Where the codes of the two layers lie."""
    return {model.get_submodule(n).inner.lowered.weight_q.data_ptr() for n in ("table", "head")}  # type: ignore


def test_tied_weights_that_are_both_quantized(tmp_path: Path) -> None:
    q = quantized("layers", BOTH, TiedWords().eval())
    assert len(codes(q)) == 1 and not any("share" in n for n in q.report.notes)
    assert q.report.bytes_after == sum({t.data_ptr(): t.nbytes for t in tensors(q).values()}.values())
    save(q, tmp_path)
    back = load(tmp_path, TiedWords().eval())
    for other in (copy.deepcopy(q), back, copy.deepcopy(q).to(torch.bfloat16)):
        assert len(codes(other)) == 1
    assert torch.equal(back(ids()), q(ids()))


def test_tied_weights_in_two_formats() -> None:
    two = copy.deepcopy(BOTH).set_local(
        "head", StaticQuantConfig(w_dtype="uint4", w_sym=False, act_dtype="fp32", bias_correction=False)
    )
    q = quantized("layers", two, TiedWords().eval())
    assert len(codes(q)) == 2 and any("table and head share one weight" in n for n in q.report.notes)


def test_layers_that_are_quantized_are_none_to_quantize() -> None:
    found = dict(RTNConfig.get_model_info(Words()))
    assert "blocks.0.q_proj" in found and "head" in found
    assert "blocks.0.q_proj" not in dict(RTNConfig.get_model_info(quantized("layers")))
