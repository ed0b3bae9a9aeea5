"""The tensor core layout of 4-bit weights: against a description of it thread by thread, and against the operator of
the CPU, which reads the same scales and zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inc_graph import numerics
from inc_graph.lowering._cuda_layout import inner_tiles, nibbles, pairs_of, stored_bytes, tiled
from inc_graph.packing import pack
from tests.backends import tinygemm

aten = torch.ops.aten
SIZES = [(8, 32), (16, 64), (24, 160), (8, 256)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def codes(n: int, k: int, signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(n + k)
    found = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    return (found.to(torch.int8) - 8) if signed else found


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n, k", SIZES)
def test_every_code_is_where_the_kernel_looks_for_it(n: int, k: int, signed: bool) -> None:
    q = codes(n, k, signed)
    stored = pack(q, "int4" if signed else "uint4")
    with tinygemm.on_cpu():
        weight = tiled(stored, signed)
    assert weight.dtype == torch.int32 and weight.numel() * 4 == stored.numel()
    assert torch.equal(tinygemm.unpack(weight), q.int() + 8 * signed)
    assert torch.equal(nibbles(weight).int(), q.int() + 8 * signed)
    assert torch.equal(stored_bytes(weight, signed), stored)


@pytest.mark.parametrize("k, inner", [(32, 2), (64, 4), (96, 2), (128, 8), (192, 4), (1024, 8), (16, None), (80, None),
                                      (0, None), (33, None)])  # fmt: skip
def test_tiles_that_a_thread_reads_at_once(k: int, inner: int | None) -> None:
    assert inner_tiles(k) == inner


@pytest.mark.parametrize("qtype, zero", [("int4", None), ("uint4", None), ("uint4", torch.uint8),
                                         ("uint4", torch.float32), ("int4", torch.int8)])  # fmt: skip
@pytest.mark.parametrize("group", [32, 64])
def test_pairs_mean_what_the_reference_computes(qtype: str, zero: torch.dtype | None, group: int) -> None:
    n, k = 32, 128
    q = codes(n, k, qtype == "int4")
    generator = torch.Generator().manual_seed(group)
    scale = (torch.rand(n, k // group, generator=generator) + 0.5).bfloat16().float()  # nothing to round away
    z = None if zero is None else (torch.rand(n, k // group, generator=generator) * 7).round().to(zero)
    expected = numerics.dequantize(q, scale, z, [1, group], qtype, torch.float32)
    pairs = pairs_of(scale, z, qtype == "int4")
    assert pairs.shape == (k // group, n, 2) and pairs.dtype == torch.bfloat16 and pairs.is_contiguous()
    step, offset = (p.t().float().repeat_interleave(group, 1) for p in pairs.unbind(-1))
    raised = q.float() + (8 if qtype == "int4" else 0)
    assert ((raised - 8) * step + offset - expected).abs().max() <= 2**-8 * 8 * scale.max()  # offset in bfloat16

    x = torch.randn(5, k, generator=generator).bfloat16()
    packed = aten._convert_weight_to_int4pack_for_cpu(raised.int(), 1)
    got = aten._weight_int4pack_mm_for_cpu(x, packed, group, pairs)
    with tinygemm.on_cpu():
        weight = tiled(pack(q, qtype), qtype == "int4")
        ours = aten._weight_int4pack_mm(x, weight, group, pairs)
    size = x.float().abs() @ expected.abs().t() + 8 * scale.max() * x.float().abs().sum(1, keepdim=True)
    assert ((ours.float() - got.float()).abs() <= 2**-7 * size).all()
    assert ((ours.float() - x.float() @ expected.t()).abs() <= 2**-7 * size).all()


@pytest.mark.parametrize("n, k, inner", [(16, 64, 4), (8, 1024, 8), (40, 96, 2)])
def test_shapes_on_a_gpu_are_those_of_torchs_own_description(n: int, k: int, inner: int) -> None:
    with FakeTensorMode():
        stored = torch.empty(n, k // 2, dtype=torch.uint8, device="cuda")
        weight = tiled(stored, True)
        assert (weight.shape, weight.dtype) == ((n // 8, k // (16 * inner), 32, inner // 2), torch.int32)
        again = stored_bytes(weight, True)
        assert (again.shape, again.dtype, again.device.type) == (stored.shape, torch.uint8, "cuda")
        scale = torch.empty(n, k // 32, dtype=torch.float16, device="cuda")
        pairs = pairs_of(scale, None, True)
        x = torch.empty(3, k, dtype=torch.bfloat16, device="cuda")
        assert aten._weight_int4pack_mm(x, weight, 32, pairs).shape == (3, n)


@needs_gpu
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n, k", [*SIZES, (4096, 1024)])
def test_the_gpus_operator_packs_as_described(n: int, k: int, signed: bool) -> None:
    q = codes(n, k, signed)
    stored = pack(q, "int4" if signed else "uint4")
    weight = tiled(stored.cuda(), signed)
    assert torch.equal(nibbles(weight).cpu().int(), q.int() + 8 * signed)
    assert torch.equal(stored_bytes(weight, signed).cpu(), stored)
    if k <= 256:
        with tinygemm.on_cpu():
            assert torch.equal(tiled(stored, signed), weight.cpu())
