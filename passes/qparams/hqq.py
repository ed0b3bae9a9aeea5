"""Half-quadratic quantization: scales that clip nothing, and real zero points that suit the weights.

H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. What the weights are off is
split into outliers `W_e`, which are left alone, and the rest, which the zero point is to make small,

    minimize over z, W_e:  |W_e|_p^p + beta / 2 |W_e - (W - (q - z) s)|_2^2,        p < 1

by turns: codes `q` by rounding; `W_e` by shrinking each error, ``sign(e) max(|e| - |e|^(p - 1) / beta, 0)``; `z` as the
mean of what remains; and a larger beta.

Worked out in steps of the codes: with ``d = W / s + z - q``, which is ``e / s``, the new zero point is ``z - mean(m)``,
where `m` is `d` with the outliers cut down. An outlier is an error beyond ``beta^(-1 / (2 - p))``. Mostly no error of a
group can be that large, which its scale alone tells, and then there is no power to compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inc_graph.errors import ConfigError
from inc_graph.passes.qparams._double import quantize_params
from inc_graph.passes.qparams._groups import check_groups, chunks, from_groups, to_groups
from inc_graph.passes.qparams._levels import levels_of
from inc_graph.passes.qparams._refine import stored
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec, scale_shape
from inc_graph.weights import Codes, Gram, WeightAlgorithm, narrow_scale

__all__ = ["HQQ"]


@ALGORITHMS.register("hqq")
@dataclass(frozen=True)
class HQQ(WeightAlgorithm):
    """Any weight and any block; asymmetric integers. A group keeps the zero point with the least mean error of all that
    were tried, so it is not worse than with the first one.

    Attributes:
        iterations: At most so many zero points are tried after the first. A part of the weight in which no group gains
            ends early.
        quant_zero: Keep the zero points as 8-bit codes, else as float16.
        quant_scale: Keep the scales as 8-bit codes.
        meta_group: How many scales, or zero points, share the parameters of these codes; -1: all.
        lp_norm: `p`, above 0 and at most 1.
        beta, kappa: `beta` at first, and by what it grows each time.
    """

    name: ClassVar[str] = "hqq"
    iterations: int = 20
    quant_zero: bool = True
    quant_scale: bool = False
    meta_group: int = 128
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        legal = {
            "iterations": isinstance(self.iterations, int) and self.iterations >= 1,
            "meta_group": isinstance(self.meta_group, int) and (self.meta_group == -1 or self.meta_group >= 2),
            "lp_norm": 0 < self.lp_norm <= 1,
            "beta": 0 < self.beta < math.inf,
            "kappa": 1 <= self.kappa < math.inf,
        }
        for field, right in legal.items():
            if not right:
                raise ConfigError(f"hqq cannot work with {field}={getattr(self, field)!r}")

    def solve(self, weight: Tensor, spec: QSpec, gram: Gram | None = None) -> Codes:
        levels, block = levels_of(spec), spec.block(weight.ndim)
        if not levels.asymmetric:
            raise ConfigError(
                f"hqq finds zero points, and {spec.qtype} {spec.scheme} has none to find", hint="use an asymmetric type"
            )
        check_groups(weight.shape, block)
        rows = to_groups(weight.detach(), block)
        real = None  # where groups are ragged, 1 for elements and 0 for what they are filled up with
        if rows.numel() != weight.numel():
            real = to_groups(torch.ones_like(weight, dtype=torch.float32), block)
        inverse, zero = rows.new_empty(len(rows), 1), rows.new_empty(len(rows), 1)
        low, high = float(levels.qtype.qmin), float(levels.qtype.qmax)
        for part in chunks(rows):
            mask = None if real is None else real[part]
            inverse[part], zero[part] = self._fit(rows[part], mask, low, high)

        shape = scale_shape(weight.shape, block)
        kept_scale, scale = self._keep(stored(inverse.reciprocal()), shape, self.quant_scale)
        kept_zero, zero = self._keep(zero, shape, self.quant_zero)
        carrier = torch.empty(rows.shape, dtype=levels.qtype.carrier, device=rows.device)
        error, energy = 0.0, 0.0
        for part in chunks(rows):
            x, s, z = rows[part], scale[part], zero[part]
            q = torch.div(x, s).add_(z).round_().clamp_(low, high)
            carrier[part] = q.to(carrier.dtype)
            off = q.sub_(z).mul_(s).sub_(x)
            error += float((off if real is None else off.mul_(real[part])).square_().sum())
            energy += float(torch.dot(x.flatten(), x.flatten()))
        notes = {"error": math.sqrt(error / energy) if energy else 0.0}
        return Codes(from_groups(carrier, weight.shape, block), kept_scale, kept_zero, spec, notes=notes)

    def _fit(self, x: Tensor, mask: Tensor | None, low: float, high: float) -> tuple[Tensor, Tensor]:
        """1 / scale and zero point of each row of `x`, ``[rows, 1]``."""
        if mask is not None:
            x = torch.where(mask > 0, x, x[:, :1])  # an element of the group, for the range
        least, most = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        span = most - least
        inverse = torch.where(span > 0, (high - low) / span, 1.0)
        inverse = torch.where(inverse.isfinite(), inverse, 1.0)
        first = zero = low - least * inverse
        count = float(x.shape[1]) if mask is None else mask.sum(1, keepdim=True)
        steps = x * inverse
        d, q = torch.empty_like(x), torch.empty_like(x)
        best, best_zero, beta = torch.full_like(zero, torch.inf), zero, self.beta
        for _ in range(self.iterations + 1):
            torch.add(steps, zero, out=d)
            torch.clamp(torch.round(d, out=q), low, high, out=q)
            d.sub_(q)
            if mask is not None:
                d.mul_(mask)
            error = torch.abs(d, out=q).sum(1, keepdim=True)
            better = error < best
            if not bool(better.any()):
                break
            best, best_zero = torch.where(better, error, best), torch.where(better, zero, best_zero)
            # without clipping an error is at most half a step; a shift of the zero point clips by no more than itself
            outlier = inverse * beta ** (-1 / (2 - self.lp_norm))
            if bool(((zero - first).abs() + 0.5 > outlier).any()):
                limit = (inverse ** (2 - self.lp_norm) / beta) * q.clamp_(min=1e-20).pow_(self.lp_norm - 1)
                d.clamp_(-limit, limit)
            zero = zero - d.sum(1, keepdim=True) / count
            beta *= self.kappa
        return inverse, best_zero

    def _keep(self, params: Tensor, shape: tuple[int, ...], quantized: bool) -> tuple[Tensor | Codes, Tensor]:
        """Scales or zero points as they are kept, and what remains of them, ``[rows, 1]``."""
        if quantized:
            codes = quantize_params(params, "uint8", "asymmetric", self.meta_group)
            return codes, codes.values().reshape(-1, 1)
        half = params.to(torch.float16)
        kept = narrow_scale(params) if bool((params > 0).all()) else half if bool(half.isfinite().all()) else params
        return kept.reshape(shape), kept.float()
