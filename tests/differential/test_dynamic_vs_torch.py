"""Dynamic layers beside torch's and torchao's: the same scales, codes at most one step apart, and where they differ.

A value next to the middle between two codes may get the other one, since scales differ in the last bit. torch's
`linear_dynamic` rounds the zero point of whichever end of the range is hit more exactly, this library that of the lower
end: values may be a step apart where the two differ. All widen the range to hold zero.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from inc_graph.export import export
from inc_graph.lowering._dynamic import dynamic_codes
from inc_graph.quantization import DynamicQuantConfig, quantize


def rows(seed: int, count: int = 7, size: int = 33) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=g) * torch.rand(count, 1, generator=g).mul(5).exp() + 0.3


@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_torchao(seed: int, symmetric: bool, per_row: bool) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    x = rows(seed)
    block, kind = [1 if per_row else len(x), x.shape[1]], torch.int8 if symmetric else torch.uint8
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    scale, zero = choose_qparams_affine(
        x, mapping, block, kind, scale_dtype=torch.float32, zero_point_dtype=torch.int32
    )
    theirs = quantize_affine(x, block, scale, zero, kind)
    offset = 128 if symmetric else 0
    name, scheme = ("int8", "symmetric") if symmetric else ("uint8", "asymmetric")
    codes, params = dynamic_codes(x, name, scheme, per_row)
    torch.testing.assert_close(params[0], scale.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(params[1] - offset, zero.flatten().float())
    apart = (codes.int() - offset - theirs.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_torchs_dynamic_linear(seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = nn.Linear(33, 20).eval(), rows(seed)
    q = quantize(export(layer, (x,)), DynamicQuantConfig(w_granularity="per_channel"))
    tensors = dict(q.graph.named_buffers())
    scale = next(t for n, t in tensors.items() if n.endswith("scale")).flatten()
    codes = next(t for n, t in tensors.items() if n.endswith("_q"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will drop it
        weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), torch.zeros(20, dtype=torch.long), 0)
        packed = torch.ops.quantized.linear_prepack(weight, layer.bias.detach())
        theirs = torch.ops.quantized.linear_dynamic(x, packed, False)
    ours = q(x)
    step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
    bound = step * (codes.float() * scale[:, None]).abs().sum(1)  # each input a step apart
    assert bool(((ours - theirs).abs() <= bound).all())
    want = layer(x)
    assert (ours - want).norm() <= 1.5 * (theirs - want).norm() + 1e-6
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()
