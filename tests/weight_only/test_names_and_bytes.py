"""Names of tensors in messages of torch, weights that are read by others too, and documented bits a weight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.quantization import GPTQConfig, RTNConfig, quantize


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inp(x))


def test_missing_and_wrong_tensors_have_the_names_of_the_state_dict() -> None:
    q = quantize(Named().eval(), RTNConfig())
    state = dict(q.state_dict())
    del state["inp.weight_q"]
    found = q.load_state_dict({**state, "inp.other": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["inp.weight_q"] and found.unexpected_keys == ["inp.other"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "inp\.weight_q"'):
        q.load_state_dict(state)
    state["inp.weight_q"] = torch.zeros(3, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"inp\.weight_q: size mismatch") as e:
        q.load_state_dict(state)
    assert "inner" not in str(e.value)
    found = q.out.load_state_dict({}, strict=False)
    assert found.missing_keys == list(q.out.state_dict())


class Reads(Named):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.inp.weight.sum()


@pytest.mark.parametrize("config", [RTNConfig(), GPTQConfig()], ids=lambda c: c.name)
def test_a_weight_that_something_else_reads_is_said_to_be_kept(config: Any) -> None:
    x = torch.randn(64, 32)
    q: Any = quantize(Reads().eval(), config, lambda m: m(x), example_inputs=(x,))
    assert any("inp shared its weight with sum" in note and "beside the codes" in note for note in q.report.notes)
    plain: Any = quantize(Named().eval(), config, lambda m: m(x), example_inputs=(x,))
    assert not any("shared" in note for note in plain.report.notes)


@pytest.mark.parametrize(("fields", "row"), [
    ({"group_size": 32}, "`bits=4, group_size=32`"),
    ({"group_size": 64, "use_sym": False}, "`bits=4, group_size=64, use_sym=False`"),
    ({"dtype": "nf4"}, '`dtype="nf4"`'),
    ({"dtype": "fp4"}, '`dtype="fp4"`'),
    ({"dtype": "fp8_e4m3"}, '`dtype="fp8_e4m3"`'),
    ({"use_double_quant": True}, "`use_double_quant=True`"),
    ({"use_double_quant": True, "use_sym": False}, "`use_double_quant=True`"),
], ids=str)  # fmt: skip
def test_the_documented_bits_of_a_weight(fields: dict[str, Any], row: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "weight_only.md").read_text()
    cells = next(line for line in text.splitlines() if line.startswith(f"| {row}")).strip(" |").split("|")
    said = [float(part.split()[0]) for part in cells[-1].split(";")]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q: Any = quantize(nn.Sequential(nn.Linear(1024, 1024, bias=False)).eval(), RTNConfig(**fields))
    bits = q.report.weights[0].bytes * 8 / 1024**2
    want = said[1] if fields.get("use_double_quant") and not fields.get("use_sym", True) else said[0]
    assert bits == pytest.approx(want, abs=0.009)
