"""What is collected of a layer's inputs for algorithms that round against them: the sum of their outer products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from inc_graph.batches import Batch
from inc_graph.errors import CalibrationError
from inc_graph.weights import Gram

__all__ = ["GramObserver", "add_products"]

_TILE = 384  # columns: what lies above the diagonal of tiles is the transpose of what lies below


def add_products(total: Tensor | None, rows: Tensor) -> Tensor:
    """``total + rows^T rows`` in float32, a new tensor; `rows` is [n, in], any float dtype.

    Only the tiles on and below the diagonal are computed, so that the result is symmetric to the last bit.
    """
    rows = rows.float()
    n = rows.shape[1]
    out = rows.new_zeros(n, n) if total is None else total.clone()
    for a in range(0, n, _TILE):
        left = rows[:, a : a + _TILE]
        for b in range(0, a + 1, _TILE):
            right = rows[:, b : b + _TILE]
            tile = out[a : a + _TILE, b : b + _TILE]
            tile.addmm_(left.t(), right)
            if a != b:
                out[b : b + _TILE, a : a + _TILE] = tile.t()
    return out


class GramObserver(nn.Module):
    """Identity on the input [*, in] of a linear layer that collects its `Gram`.

    Args:
        node, module: The layer, for messages.

    Attributes:
        elements: Numbers taken in.
        enabled: False makes it a bare identity.
        total: float32 [in, in] or None before the first batch. Never changed in place.
        count: Rows taken in.
        known: See `Gram.known`; layers that read the same inputs share it.
    """

    def __init__(self, node: str = "", module: str = "") -> None:
        super().__init__()
        self.node, self.module_path = node, module
        self.count = self.elements = 0
        self.known: dict[Any, Any] = {}
        self.enabled = True
        self.batch: Batch | None = None
        self.total: Tensor | None
        self.register_buffer("total", None)

    def reset(self) -> None:
        """Forget all data."""
        self.total, self.count, self.elements, self.known = None, 0, 0, {}

    def snapshot(self) -> Any:
        """What was collected; nothing is copied."""
        return self.total, self.count, self.elements

    def restore(self, state: Any) -> None:
        """Back to a snapshot."""
        self.total, self.count, self.elements = state
        self.known = {}

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself. CalibrationError if it holds NaN or infinity, or another number of channels than before."""
        if self.enabled and not (isinstance(x, FakeTensor) or x.is_meta) and x.numel():
            with torch.inference_mode(False), torch.no_grad():
                self._add(x.detach())
        return x

    def _add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if self.total is not None and self.total.shape[0] != rows.shape[1]:
            raise self._error(f"its input had {self.total.shape[0]} channels before and has {rows.shape[1]} now", None)
        if self.batch is not None:
            self.batch.note(self)
        total = add_products(self.total, rows)
        if not bool(total.diagonal().isfinite().all()):  # of a square no NaN and no infinity is lost
            raise self._error("its input holds NaN or infinity, or is too large to be squared", "check that batch")
        self.total, self.count, self.elements = total, self.count + len(rows), self.elements + rows.numel()
        self.known = {}

    def gram(self) -> Gram:
        """What was collected. CalibrationError without data."""
        if self.total is None:
            raise self._error("saw no data", "run calibration data through the prepared model before converting it")
        return Gram(self.total, self.count, self.known)

    def calculate_qparams(self) -> Gram:
        """As `gram`: what every observer has, to ask whether it has seen data."""
        return self.gram()

    def _error(self, message: str, hint: str | None) -> CalibrationError:
        return CalibrationError(message, node=self.node or None, module=self.module_path, hint=hint)

    def extra_repr(self) -> str:
        return f"{self.node!r}, rows={self.count}"
