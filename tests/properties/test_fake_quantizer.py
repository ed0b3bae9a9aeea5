"""Fake quantizers, for any tensor: values of the reference, gradients as each of them promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inc_graph.fake_quantizer import OwnScale, TrackedRange
from inc_graph.learned_step import LearnedStep
from inc_graph.numerics import choose_qparams, fake_quantize, in_range
from inc_graph.spec import PerChannel, PerGroup, PerTensor, QSpec

shapes = st.tuples(st.integers(1, 4), st.integers(1, 70))
seeds = st.integers(0, 2**16)
sizes = st.sampled_from([1e-4, 1.0, 300.0])


def tensor(shape: tuple[int, int], seed: int, size: float) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).requires_grad_()


@pytest.mark.parametrize("qtype", ["mxfp8_e4m3", "mxfp6_e3m2", "mxfp4", "mxint8", "int8", "int4", "fp8_e4m3"])
@given(shapes, seeds, sizes)
@settings(max_examples=15, deadline=None)
def test_own_scale(qtype: str, shape: tuple[int, int], seed: int, size: float) -> None:
    granularity = PerGroup(32, -1) if qtype.startswith("mx") else PerChannel(0)
    spec = QSpec(qtype, granularity=granularity)
    x = tensor(shape, seed, size)
    y = OwnScale(spec, "weight", "w")(x)
    block = spec.block(2)
    scale, zero = choose_qparams(x.detach(), block, qtype)
    assert torch.equal(y, fake_quantize(x.detach(), scale, zero, block, qtype))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(x.grad, grad)


@given(shapes, seeds, st.floats(0.2, 3.0))
@settings(max_examples=25, deadline=None)
def test_tracked_range(shape: tuple[int, int], seed: int, factor: float) -> None:
    """In evaluation the range stands still, and the gradient stops where a value is beyond it."""
    spec = QSpec("uint8", "asymmetric", PerTensor())
    quantizer = TrackedRange(spec, "input", "x")
    quantizer(tensor(shape, seed, 1.0))
    x = tensor(shape, seed + 1, factor)
    y = quantizer.eval()(x)
    scale, zero = (t.reshape(1, 1) for t in quantizer.params() if t is not None)
    assert torch.equal(y, fake_quantize(x.detach(), scale, zero, (-1, -1), "uint8"))
    y.sum().backward()
    assert torch.equal(x.grad, in_range(x.detach(), scale, zero, (-1, -1), "uint8").float())


@given(shapes, seeds)
@settings(max_examples=25, deadline=None)
def test_learned_step_goes_down_the_slope(shape: tuple[int, int], seed: int) -> None:
    """A step is moved to where the error is smaller, if the error is what is learned."""
    x = tensor(shape, seed, 1.0).detach()
    spec = QSpec("int4", "symmetric", PerChannel(0))
    quantizer = LearnedStep(spec, "weight", "w", weight=x)
    assert quantizer.step.shape == (shape[0], 1) and bool((quantizer.step > 0).all())
    loss = (quantizer(x) - x).square().sum()
    loss.backward()
    assert quantizer.step.grad is not None and bool(quantizer.step.grad.isfinite().all())
    slope = quantizer.step.grad * (shape[1] * 7) ** 0.5  # without the scaling of the gradient
    # the error of a value is e(s) = s round(x / s) - x, the codes standing still: d/ds e^2 = 2 e round(x / s), clipped
    codes = (x / quantizer.step.detach()).round().clamp(-8, 7)
    inside = ((x / quantizer.step.detach()).round() >= -8) & ((x / quantizer.step.detach()).round() <= 7)
    straight = torch.where(inside, codes - x / quantizer.step.detach(), codes)
    want = (2 * (quantizer(x).detach() - x) * straight).sum(1, keepdim=True)
    assert torch.allclose(slope, want, rtol=1e-3, atol=1e-5)
