"""The reference maths against torch's own quantization operators, its observers and torchao.

Bit for bit wherever the other computes the same expression. Where it rounds in another order the difference is at most
one step, only at values that stand within float32 rounding of a tie, and the test says which expression the other has.
"""

from __future__ import annotations

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from inc_graph import numerics as N
from inc_graph.qtypes import get_qtype

D = torch.ops.quantized_decomposed
INTS = ["int8", "uint8", "int16", "int7", "int4", "uint2"]
SEEDS = range(4)


def draw(seed: int, shape: tuple[int, ...] = (16, 48)) -> torch.Tensor:
    """Normal values of a seed's own magnitude, with ties, zeros, and outliers in them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10.0 ** (seed - 2)
    x.view(-1)[::7] = torch.randint(-9, 9, (x.view(-1)[::7].numel(),), generator=generator) * 0.5
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, 1e6, -1e6])
    return x


def limits(name: str) -> tuple[int, int]:
    qtype = get_qtype(name)
    return int(qtype.qmin), int(qtype.qmax)


def params(x: torch.Tensor, block: tuple[int, ...], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales for the bulk of the values, so that the outliers saturate."""
    return N.choose_qparams(x.clamp(-2, 3), block, name, "asymmetric")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["int8", "uint8", "int7", "int4", "uint2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fake_quantize_per_tensor(seed: int, name: str, dtype: torch.dtype) -> None:
    x = draw(seed).clamp(-6e4, 6e4).to(dtype)
    scale, zero_point = params(x, (-1, -1), name)
    ours = N.fake_quantize(x, scale, zero_point, (-1, -1), name)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.view(()), zero_point.view(()), *limits(name))
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["int8", "uint8", "int7", "int4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_fake_quantize_per_channel(seed: int, name: str, axis: int) -> None:
    x = draw(seed)
    block = (1, -1) if axis == 0 else (-1, 1)
    scale, zero_point = params(x, block, name)
    ours = N.fake_quantize(x, scale, zero_point, block, name)
    theirs = torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero_point.flatten(), axis, *limits(name))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", INTS)
def test_decomposed_per_tensor(seed: int, name: str) -> None:
    x, carrier = draw(seed), get_qtype(name).carrier
    scale, zero_point = params(x, (-1, -1), name)
    q = N.quantize(x, scale, zero_point, (-1, -1), name)
    args = (float(scale), int(zero_point), *limits(name), carrier)
    assert torch.equal(q, D.quantize_per_tensor(x, *args))
    assert torch.equal(q, D.quantize_per_tensor.tensor(x, scale.view(()), zero_point.view(()), *limits(name), carrier))
    assert torch.equal(N.dequantize(q, scale, zero_point, (-1, -1), name), D.dequantize_per_tensor(q, *args))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_decomposed_per_channel(seed: int, name: str, axis: int) -> None:
    x, carrier = draw(seed, (4, 8, 6)), get_qtype(name).carrier
    block = tuple(1 if d == axis else -1 for d in range(3))
    scale, zero_point = params(x, block, name)
    args = (scale.flatten(), zero_point.flatten(), axis, *limits(name), carrier)
    q = N.quantize(x, scale, zero_point, block, name)
    assert torch.equal(q, D.quantize_per_channel(x, *args))
    assert torch.equal(N.dequantize(q, scale, zero_point, block, name), D.dequantize_per_channel(q, *args))


@pytest.mark.parametrize("seed", SEEDS)
def test_decomposed_per_token(seed: int) -> None:
    """It divides (``x / scale``) where we multiply by the reciprocal: one step apart, and only next to a tie."""
    x = draw(seed)
    scale, zero_point = params(x, (1, -1), "int8")
    ours = N.quantize(x, scale, zero_point, (1, -1), "int8")
    theirs = D.quantize_per_token(x, scale, zero_point, -128, 127, torch.int8)
    one_step_next_to_a_tie(x, scale, ours, theirs)
    back = D.dequantize_per_token(ours, scale, zero_point, -128, 127, torch.int8, torch.float32)
    assert torch.equal(N.dequantize(ours, scale, zero_point, (1, -1), "int8"), back)


@pytest.mark.parametrize("seed", SEEDS)
def test_decomposed_per_group(seed: int) -> None:
    """Rounds ``x / scale + zero_point`` as one sum: with a zero point, ties to even fall the other way."""
    x = draw(seed)
    scale, _ = params(x, (1, 16), "int4")
    ours = N.quantize(x, scale, None, (1, 16), "int4")
    zeros = torch.zeros_like(scale)
    theirs = D.quantize_per_channel_group(x, scale, zeros, -8, 7, torch.int8, 16)
    one_step_next_to_a_tie(x, scale.repeat_interleave(16, 1), ours, theirs)
    back = D.dequantize_per_channel_group(ours, scale, zeros, -8, 7, torch.int8, 16, torch.float32)
    assert torch.equal(N.dequantize(ours, scale, None, (1, 16), "int4"), back)


def one_step_next_to_a_tie(x: torch.Tensor, scale: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    apart = a != b
    assert (a.int() - b.int()).abs().max() <= 1
    exact = x.double() / scale.double()
    to_a_tie = (exact - exact.floor() - 0.5).abs()
    assert (to_a_tie[apart] <= exact[apart].abs() * 2.0**-22).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("int8", torch.qint8), ("uint8", torch.quint8), ("int7", torch.qint8), ("int4", torch.qint8)]
)
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_observers(seed: int, name: str, dtype: torch.dtype, scheme: str) -> None:
    """Scales and zero points of torch's min-max observers, whose floor on the scale no drawn range reaches.

    An explicit range is given for narrow formats only: for unsigned ones it moves the observers' symmetric zero point
    from the default 128 to 127.
    """
    x = draw(seed)
    bounds = {} if "8" in name else dict(zip(("quant_min", "quant_max"), limits(name), strict=True))
    kind = "affine" if scheme == "asymmetric" else "symmetric"
    whole = MinMaxObserver(dtype, getattr(torch, f"per_tensor_{kind}"), **bounds)
    rows = PerChannelMinMaxObserver(0, dtype, getattr(torch, f"per_channel_{kind}"), **bounds)
    for observer, block in ((whole, (-1, -1)), (rows, (1, -1))):
        observer(x)
        scale, zero_point = N.choose_qparams(x, block, name, scheme)
        theirs, point = observer.calculate_qparams()
        assert torch.equal(scale.flatten(), theirs)
        assert torch.equal(zero_point.flatten().long(), point.long())


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_cast(name: str) -> None:
    """With scale one, the codes are the dtype's own cast of everything that it can hold."""
    dtype = get_qtype(name).carrier
    top = torch.finfo(dtype).max
    x = torch.cat([draw(3).flatten().clamp(-top, top), torch.linspace(-top, top, 9999), torch.tensor([float("nan")])])
    q = N.quantize(x, torch.ones(1), None, (-1,), name)
    assert torch.equal(q.view(torch.uint8), x.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (1, 16), (4, 12)])
def test_torchao_affine(seed: int, name: str, block: tuple[int, int]) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

    x, carrier = draw(seed), get_qtype(name).carrier
    sizes = [n if g == -1 else g for n, g in zip(x.shape, block, strict=True)]
    scale, zero_point = params(x, block, name)
    q = N.quantize(x, scale, zero_point, block, name)
    assert torch.equal(q, quantize_affine(x, sizes, scale, zero_point, carrier, *limits(name)))
    back = dequantize_affine(q, sizes, scale, zero_point, carrier, *limits(name))
    assert torch.equal(N.dequantize(q, scale, zero_point, block, name), back)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (1, 16)])
@pytest.mark.parametrize(("name", "affine"), [("int8", False), ("uint4", True), ("int8", True)])
def test_torchao_choose(seed: int, block: tuple[int, int], name: str, affine: bool) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

    x = draw(seed)
    sizes = [n if g == -1 else g for n, g in zip(x.shape, block, strict=True)]
    kind = MappingType.ASYMMETRIC if affine else MappingType.SYMMETRIC
    scale, zero_point = choose_qparams_affine(
        x, kind, sizes, get_qtype(name).carrier, *limits(name), eps=2.0**-120, zero_point_dtype=torch.int32
    )
    ours, point = N.choose_qparams(x, block, name, "asymmetric" if affine else "symmetric")
    assert torch.equal(ours.flatten(), scale.flatten()) and torch.equal(point.flatten(), zero_point.flatten())


@pytest.mark.parametrize("element", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"])
@pytest.mark.parametrize("seed", SEEDS)
def test_torchao_mx(element: str, seed: int) -> None:
    """Shared exponents and elements of torchao's MX cast (its FLOOR rule is the standard's)."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    from torchao.prototype.mx_formats import constants

    x = draw(seed, (8, 64))
    x[0, :4] = torch.tensor([0.0, -0.0, 3.0, -5.0])  # no outliers of 1e6: the others would all become zero
    dtypes = {
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp4": torch.float4_e2m1fn_x2,
        "mxfp6_e2m3": constants.DTYPE_FP6_E2M3,
        "mxfp6_e3m2": constants.DTYPE_FP6_E3M2,
    }
    cast = mx.MXTensor.to_mx(x, dtypes[element], 32)
    scale, _ = N.choose_qparams(x, (1, 32), element, "symmetric")
    shared = cast.scale.view(torch.float8_e8m0fnu).float().view(8, 2)
    assert torch.equal(scale, shared)
    assert torch.equal(N.fake_quantize(x, scale, None, (1, 32), element), cast.dequantize(torch.float32))
