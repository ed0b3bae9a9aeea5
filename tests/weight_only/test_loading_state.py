"""`load_state_dict` of a converted model whose scales or zero points need another dtype than those it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inc_graph.export import export
from inc_graph.quantization import RTNConfig, quantize


def quantized(shift: float, scale: float, config: RTNConfig, exported: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(64, 16, bias=False)
    layer.weight.data.mul_(scale).add_(shift)
    model = nn.Sequential(layer).eval()
    made: nn.Module = quantize(export(model, (torch.zeros(3, 64),)) if exported else model, config)
    return made


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e7])
def test_scales_that_float16_does_not_hold(scale: float, assign: bool, exported: bool) -> None:
    x = torch.randn(3, 64)
    source, target = (quantized(0, s, RTNConfig(), exported) for s in (scale, 1.0))
    state = {k: v.clone() for k, v in source.state_dict().items()}
    assert {v.dtype for v in state.values()} - {torch.uint8} == {torch.float32}
    before = {k: v.dtype for k, v in target.state_dict().items()}
    assert torch.float16 in before.values()
    target.load_state_dict(state, assign=assign)
    assert torch.equal(target(x), source(x))
    assert {k: v.dtype for k, v in target.state_dict().items()} == {k: v.dtype for k, v in state.items()}
    state.clear()
    back = quantized(0, 1.0, RTNConfig(), exported)
    want = back(x)
    target.load_state_dict(back.state_dict())  # and what they do hold goes into float32 as it is
    assert torch.equal(target(x), want)


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_zero_points_of_either_sign(bits: int, exported: bool) -> None:
    config, x = RTNConfig(bits=bits, use_sym=False, group_size=-1), torch.randn(3, 64)
    for shifts in ((0.3, -0.3), (-0.3, 0.3)):
        source, target = (quantized(shift, 1.0, config, exported) for shift in shifts)
        target.load_state_dict(source.state_dict())
        assert torch.equal(target(x), source(x))


def test_codes_of_another_dtype_are_still_refused() -> None:
    target = quantized(0, 1.0, RTNConfig(bits=8), True)
    state = {k: v.int() if v.dtype == torch.int8 else v for k, v in target.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"it is torch\.int32, the model has torch\.int8"):
        target.load_state_dict(state)
