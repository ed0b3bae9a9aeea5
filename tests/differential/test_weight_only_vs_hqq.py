"""Half-quadratic quantization against the `hqq` package.

Both iterate the same formula from the same start. The package ends it for all groups at once, as soon as the mean error
of all of them stops falling, and takes the last zero points; ours keeps the best of each group. So zero points differ
in their last moves, and codes where a weight is about half way between two of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inc_graph.passes.qparams.hqq import HQQ
from inc_graph.spec import PerGroup, QSpec

package = pytest.importorskip("hqq.core.quantize")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
def test_codes_and_errors(bits: int, size: float) -> None:
    weight = normal(96, 256, seed=bits) * size
    codes, meta = package.Quantizer.quantize(weight, nbits=bits, group_size=64, axis=1, bitpack=False, device="cpu")
    values = ((codes.float() - meta["zero"]) * meta["scale"]).reshape(96, 256)
    spec = QSpec(f"uint{bits}", "asymmetric", PerGroup(64))
    ours = HQQ(quant_zero=False).solve(weight, spec)
    mine, other = (float((v - weight).abs().mean()) for v in (ours.values(), values))
    assert mine <= other * 1.002
    torch.testing.assert_close(ours.params()[0].float().flatten(), meta["scale"].flatten(), rtol=1e-3, atol=0)
    off = (ours.params()[1].float().flatten() - meta["zero"].flatten()).abs()  # type: ignore[union-attr]
    assert float(off.mean()) < 0.05
    assert float((ours.carrier.flatten() == codes.flatten()).float().mean()) > 0.96
    assert bool(((ours.carrier.float().flatten() - codes.float().flatten()).abs() <= 1).all())


def test_groups_across_the_outputs() -> None:
    """The package puts rows that are far apart into one group; with groups of all rows both mean the same."""
    weight = normal(64, 48) * 0.05
    codes, meta = package.Quantizer.quantize(weight, nbits=4, group_size=64, axis=0, bitpack=False, device="cpu")
    values = ((codes.float() - meta["zero"]) * meta["scale"]).reshape(64, 48)
    ours = HQQ(quant_zero=False).solve(weight, QSpec("uint4", "asymmetric", PerGroup(64, 0)))
    assert float((ours.values() - weight).abs().mean()) <= float((values - weight).abs().mean()) * 1.001
    assert float((ours.carrier == codes.reshape(64, 48)).float().mean()) > 0.96


@pytest.mark.parametrize("quant_scale", [False, True])
def test_quantized_parameters(quant_scale: bool) -> None:
    weight = normal(128, 256) * 0.05
    layer = torch.nn.Linear(256, 128, bias=False)
    layer.weight.data = weight.clone()
    config = package.hqq_base_quant_config(nbits=4, group_size=64, quant_zero=True, quant_scale=quant_scale, axis=1)
    theirs = package.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu").dequantize()
    ours = HQQ(quant_scale=quant_scale).solve(weight, QSpec("uint4", "asymmetric", PerGroup(64))).values()
    assert float((ours - weight).abs().mean()) <= float((theirs - weight).abs().mean()) * 1.002
