"""The Hessian of a layer's output error, ready for solvers: scaled, damped, and the factor of its inverse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inc_graph.errors import CalibrationError
from inc_graph.weights import Gram

__all__ = ["Hessian", "hessian_of"]

_SAFE = 1e-3  # with less damping than this the condition number may be beyond float32
_LEAST_PART = 64  # smaller matrix products are slower than what they save
_LEAST = 1e-4  # the first damping that is tried where none was asked for and it does not do without


@dataclass
class Hessian:
    """``sum x x^T`` over the mean of its diagonal, float32 ``[in, in]``.

    Attributes:
        plain: Without damping: what errors are measured with. 0 if the inputs were.
        damped: With so much added to its diagonal that it is positive definite.
        damping: How much that is, as a share of the mean of the diagonal.
        factors: Results of `inverse_factor` by order, for the next layer that reads the same inputs.
    """

    plain: Tensor
    damped: Tensor
    damping: float
    factors: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def errors(self, delta: Tensor) -> Tensor:
        """What weights ``[in, out]`` that are off by `delta` cost each output: ``delta^T H delta``, ``[out]``."""
        total = torch.zeros_like(delta[0])
        step = max(_LEAST_PART, -(-len(delta) // 8))
        for a in range(0, len(delta), step):  # H is symmetric: the blocks below the diagonal count as those above
            rest = self.plain[a : a + step, a:]
            near, far = rest[:, :step] @ delta[a : a + step], rest[:, step:] @ delta[a + step :]
            total += (near.add_(far, alpha=2).mul_(delta[a : a + step])).sum(0)
        return total

    def permuted(self, order: Tensor) -> Hessian:
        """That of the same inputs in another order."""
        plain, damped = (h[order][:, order] for h in (self.plain, self.damped))
        return Hessian(plain, damped, self.damping)

    def inverse_factor(self, order: Tensor | None) -> Tensor:
        """Upper triangular ``r`` with ``r^T r`` the inverse of ``damped[order][:, order]``. Damps more if need be."""
        key = None if order is None else tuple(order.tolist())
        while key not in self.factors:
            h = self.damped if order is None else self.damped[order][:, order]
            for dtype in (torch.float32, torch.float64) if self.damping >= _SAFE else (torch.float64,):
                found = _inverse_factor(h.to(dtype))
                if found is not None:
                    self.factors[key] = found
                    return found
            more = max(10 * self.damping, _LEAST)
            self.damped.diagonal().add_(more - self.damping)
            self.damping = more
            self.factors.clear()
        return self.factors[key]


def hessian_of(gram: Gram | None, inputs: int, damping: float) -> Hessian:
    """The Hessian of a layer with so many inputs. CalibrationError if the gram is missing, empty or of no use."""
    if gram is None or gram.count == 0:
        raise CalibrationError(
            "the layer has seen no inputs, and gptq needs them", hint="run calibration data that reaches this layer"
        )
    matrix = gram.matrix
    if tuple(matrix.shape) != (inputs, inputs):
        raise CalibrationError(f"inputs of {list(matrix.shape)} were collected for a weight with {inputs} inputs")
    if ("hessian", damping) in gram.known:
        known: Hessian = gram.known["hessian", damping]
        return known
    if not bool(matrix.isfinite().all()):
        raise CalibrationError("the inputs of the layer hold NaN or infinity, or their squares overflow")
    mean = matrix.diagonal().double().mean().clamp(min=torch.finfo(torch.float32).tiny)
    plain = (matrix / mean).float()
    damped = plain.clone()
    diagonal = damped.diagonal()
    dead = diagonal <= 0  # inputs that are always 0: whatever their weights are, outputs do not change
    diagonal.add_(damping)
    diagonal[dead] = max(damping, _LEAST)
    gram.known["hessian", damping] = found = Hessian(plain, damped, damping)
    return found


def _inverse_factor(h: Tensor) -> Tensor | None:
    """None if `h` is not positive definite to the precision of its dtype."""
    # h = u u^T with u upper triangular, from the Cholesky factor of h turned around; then r = u^-1
    factor, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(failed) != 0:
        return None
    factor = factor.flip(0, 1)
    r = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    torch.linalg.solve_triangular(factor, r, upper=True, out=r)
    return r.float().contiguous() if bool(r.isfinite().all()) else None
