"""Parts of a graph in training that evaluation has otherwise: batch norms, folded or not, dropout, ends of gradients.

A batch norm behind a convolution or linear layer is folded while the model learns, so that what is rounded is what will
be rounded after conversion (Jacob et al. 2018, section 3.2):

    k = gamma / sqrt(running_var + eps)                      one value a channel, of before the step
    training    y = W_q(k W) * x;   z = y / k + b;   BN(z)    normalized by the statistics of the batch
    evaluation  y = W_q(k W) * x + beta + k (b - running_mean)

Weights are scaled by the running variance, also in training, and the result is scaled back (Krishnamoorthi 2018,
section 3.2.2.1): the codes do not jump from batch to batch, and the convolution runs once, not once more for the
statistics. Frozen statistics are those of evaluation.

None of these modules holds a parameter: those of the model are read where they are, and given to the calls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ApplyMask", "Attention", "Detach", "DropoutMask", "FoldedNorm", "FoldedWeight", "Norm"]

LEAST = 1e-8  # a channel whose factor is smaller could not be scaled back


def factor(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """`k`: one value a channel."""
    k = (var + eps).rsqrt()
    k = k if gamma is None else k * gamma
    return torch.where(k.abs() < LEAST, torch.full_like(k, LEAST), k)


class Norm(nn.Module):
    """A batch norm over dimension 1 that is not folded.

    Args:
        momentum, eps: Of the batch norm.
        frozen: Statistics are those of evaluation from the start.
    """

    frozen: Tensor

    def __init__(self, momentum: float, eps: float, frozen: bool = False) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("frozen", torch.tensor(int(frozen)))
        self._fixed = frozen  # the same, without asking a tensor

    def freeze(self) -> None:
        """Normalize by the running statistics from now on, and leave them as they are."""
        self.frozen.fill_(1)
        self._fixed = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(prefix + "frozen", self.frozen)  # a checkpoint of the float model says nothing
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._fixed = bool(self.frozen)

    @property
    def learns(self) -> bool:
        """Whether it normalizes by the statistics of the batch."""
        return self.training and not self._fixed

    def forward(
        self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, count: Tensor | None
    ) -> Tensor:
        if self.learns and count is not None:
            count.add_(1)
        return F.batch_norm(x, mean, var, gamma, beta, self.learns, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, eps={self.eps}{', frozen' if self._fixed else ''}"


class FoldedNorm(Norm):
    """What stands behind a layer without bias whose weight is scaled by `FoldedWeight`; `bias` is the layer's own."""

    def forward(  # type: ignore[override]
        self, y: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor,
        count: Tensor | None,
    ) -> Tensor:  # fmt: skip
        shape = [1, -1, *[1] * (y.ndim - 2)]
        if not self.learns:
            return y + self.shift(bias, gamma, beta, mean, var).to(y.dtype).view(shape)
        z = y / factor(gamma, var, self.eps).to(y.dtype).view(shape)
        z = z if bias is None else z + bias.to(y.dtype).view(shape)
        return super().forward(z, gamma, beta, mean, var, count)

    def shift(
        self, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        """Bias of the folded layer, float [channels]."""
        moved = (-mean if bias is None else bias - mean) * factor(gamma, var, self.eps)
        return moved if beta is None else moved + beta


class FoldedWeight(nn.Module):
    """`k W` along the output channels: dimension `axis` of the weight, whose inputs are in `groups`."""

    def __init__(self, eps: float, axis: int, groups: int) -> None:
        super().__init__()
        self.eps, self.axis, self.groups = eps, axis, groups

    def forward(self, weight: Tensor, gamma: Tensor | None, var: Tensor) -> Tensor:
        k = factor(gamma, var, self.eps).to(weight.dtype)
        if self.axis == 0:
            return weight * k.view(-1, *[1] * (weight.ndim - 1))
        grouped = weight.unflatten(0, (self.groups, -1))  # transposed: [groups, in / groups, out / groups, *kernel]
        return (grouped * k.view(self.groups, 1, -1, *[1] * (weight.ndim - 2))).flatten(0, 1)


class Detach(nn.Module):
    """Where the model stops a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class DropoutMask(nn.Module):
    """In training what a dropout multiplies by, shaped as its input; in evaluation its input, which nobody reads."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.ones_like(x), self.p) if self.training else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ApplyMask(nn.Module):
    """In training `x` times the mask; in evaluation `x`."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask if self.training else x


class Attention(nn.Module):
    """Scaled dot product attention that drops weights at random in training."""

    def __init__(self, p: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.p, self.options = p, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=p, **self.options)

    def extra_repr(self) -> str:
        return f"p={self.p}"
