"""Round to nearest and GPTQ against neural_compressor 3.10, the library whose interface this one has.

Integers of round-to-nearest are equal, all of them, where both mean the same: integers of any width, symmetric and
asymmetric, with and without the full range, nf4, and fp4 of bitsandbytes. Not compared: groups of nothing but zeros, to
which they give the range from -1 to 1; and their fp4_e2m1, which has 1/16 where the format has 1/2. With quantized
scales the scales are equal, and ours rounds the weights by these, theirs by the scales before that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inc_graph.passes.qparams.gptq import GPTQ
from inc_graph.passes.qparams.rtn import RTN
from inc_graph.spec import PerGroup, QSpec
from inc_graph.weights import Codes, Gram

utility = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.utility")
gptq = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.gptq")
gptq.transformers = pytest.importorskip("transformers")  # it takes it only from who has imported it before


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theirs(weight: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return utility.quant_tensor(weight.clone(), return_int=True, **options)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scheme", ["sym", "asym"])
@pytest.mark.parametrize("group", [32, 50, -1])
@pytest.mark.parametrize("full_range", [False, True])
def test_integers_are_equal(bits: int, scheme: str, group: int, full_range: bool) -> None:
    weight = normal(96, 160, seed=bits) * torch.exp(normal(96, 1, seed=1))
    weight[4, :40] = weight[4, :40].abs()
    codes, scale, zero = theirs(weight, bits=bits, group_size=group, scheme=scheme, full_range=full_range)
    qtype, name = (f"int{bits}", "symmetric") if scheme == "sym" else (f"uint{bits}", "asymmetric")
    ours = RTN(full_range=full_range).solve(weight, QSpec(qtype, name, PerGroup(group)))
    assert torch.equal(ours.carrier.float(), codes.float())
    torch.testing.assert_close(ours.params()[0].float(), scale, rtol=2e-3, atol=0)
    assert (zero is None and ours.zero_point is None) or torch.equal(ours.params()[1].float(), zero)  # type: ignore


@pytest.mark.parametrize(("ours", "named"), [("nf4", "nf4"), ("fp4_bnb", "fp4")])
def test_numbers_of_4_bit_floats_are_equal(ours: str, named: str) -> None:
    weight = normal(64, 96)
    codes, scale, _ = theirs(weight, bits=4, group_size=32, dtype=named, scheme="sym")
    number = dict(zip(utility.INT_MAPPING[named], utility.FLOAT_MAPPING[named], strict=True))
    values = torch.tensor([number[int(c)] for c in codes.flatten()]).reshape(64, 3, 32) * scale[:, :, None]
    found = RTN().solve(weight, QSpec(ours, "symmetric", PerGroup(32)))
    torch.testing.assert_close(found.values(), values.reshape(64, 96), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("scheme", ["sym", "asym"])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_quantized_scales_are_equal(bits: int, scheme: str, kind: str) -> None:
    weight = normal(64, 256) * torch.exp(0.3 * normal(64, 1, seed=2))
    double = {
        "double_quant": True, "double_quant_dtype": "int", "double_quant_bits": bits,
        "double_quant_scheme": scheme, "double_quant_group_size": 256,
    }  # fmt: skip
    values = utility.quant_tensor(weight.clone(), bits=4, group_size=32, scheme=kind, return_int=False, **double)
    _, scale, _ = theirs(weight, bits=4, group_size=32, scheme=kind, **{**double, "double_quant_return_int": False})
    spec = QSpec("int4" if kind == "sym" else "uint4", f"{kind}metric", PerGroup(32))
    ours = RTN(scale_type=f"int{bits}", scale_scheme=f"{scheme}metric").solve(weight, spec)
    assert isinstance(ours.scale, Codes)
    torch.testing.assert_close(ours.params()[0], scale.reshape(64, 8), rtol=1e-4, atol=1e-6)
    assert float((ours.values() - weight).square().sum()) <= float((values - weight).square().sum()) * 1.0001


def test_search_is_at_least_as_good() -> None:
    layer = nn.Linear(256, 64, bias=False)
    layer.weight.data = normal(64, 256) * torch.exp(0.5 * normal(64, 1, seed=2))
    weight = layer.weight.detach().clone()
    for bits in (2, 3, 4, 8):
        for scheme, qtype in (("sym", f"int{bits}"), ("asym", f"uint{bits}")):
            ratio = utility.search_clip(layer, bits=bits, group_size=32, scheme=scheme)
            values = utility.quant_tensor(weight.clone(), bits=bits, group_size=32, scheme=scheme, quantile=ratio)
            ours = RTN(search=True).solve(weight, QSpec(qtype, f"{scheme}metric", PerGroup(32))).values()
            assert float((ours - weight).norm()) <= float((values - weight).norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}])
def test_the_objective_of_gptq_is_at_or_below_theirs(symmetric: bool, search: bool, options: dict[str, Any]) -> None:
    x = normal(600, 128) @ (normal(128, 128, seed=3) / 11 + torch.eye(128)) * torch.exp(0.7 * normal(128, seed=4))
    weight = normal(64, 128)
    layer = nn.Linear(128, 64, bias=False)
    layer.weight.data = weight.clone()
    solver = gptq.GPTQ(layer, weight.clone())
    solver.quantizer.configure({
        "dtype": "int", "bits": 4, "sym": symmetric, "group_size": 32, "mse": search, "perchannel": True,
        "use_double_quant": False, "double_quant_sym": False, "double_quant_dtype": "int", "double_quant_bits": 8,
        "double_quant_group_size": 256,
    })  # fmt: skip
    solver.add_batch(x, None)
    values = solver.fasterquant(weight.clone(), blocksize=2048, percdamp=0.01, groupsize=32, **options)[-1]
    spec = QSpec("int4" if symmetric else "uint4", "symmetric" if symmetric else "asymmetric", PerGroup(32))
    for refine in (0, 1):
        ours = GPTQ(search=search, refine=refine, **options).solve(weight, spec, Gram(x.T @ x, 600)).values()
        mine, other = (float((x @ (v - weight).T).square().sum()) for v in (ours, values))
        assert mine <= other * (1.0 if refine else 1.1)
