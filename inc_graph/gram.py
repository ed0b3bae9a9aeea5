"""What is collected of a layer's inputs for algorithms that round against them: the sum of their outer products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from inc_graph.batches import Batch
from inc_graph.errors import CalibrationError
from inc_graph.products import add_products
from inc_graph.weights import Gram

__all__ = ["GramObserver"]


class GramObserver(nn.Module):
    """Identity on the input of a layer that collects its `Gram`.

    Args:
        node, module: The layer, for messages.
        unfold: For a convolution: makes chunks of rows [groups, n, in] of an input. None: the input is [*, in].

    Attributes:
        elements: Numbers taken in.
        enabled: False makes it a bare identity.
        total: float32 [in, in], with `unfold` [groups, in, in], or None before the first batch. Never changed in place.
        count: Rows taken in (of each group).
        known: See `Gram.known`; layers that read the same inputs share it.
    """

    def __init__(
        self, node: str = "", module: str = "", unfold: Callable[[Tensor], Iterable[Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.node, self.module_path, self.unfold = node, module, unfold
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
        total, count, elements = self.total, self.count, self.elements
        for rows in [x.reshape(-1, x.shape[-1])] if self.unfold is None else self.unfold(x):
            if total is not None and total.shape[-1] != rows.shape[-1]:
                raise self._error(f"its input had {total.shape[-1]} channels before and has {rows.shape[-1]} now", None)
            total = self._sum(total, rows)
            count, elements = count + rows.shape[-2], elements + rows.numel()
        if total is None or count == self.count:
            return
        if self.batch is not None:
            self.batch.note(self)
        if not bool(total.diagonal(dim1=-2, dim2=-1).isfinite().all()):  # of a square no NaN and no infinity is lost
            number = "" if self.batch is None or not self.batch.open else f"calibration call {self.batch.calls + 1}: "
            text = f"{number}its input holds NaN or infinity, or is too large to be squared"
            raise self._error(text, "check that batch")
        self.total, self.count, self.elements, self.known = total, count, elements, {}

    def _sum(self, total: Tensor | None, rows: Tensor) -> Tensor:
        """`total` and the products of more rows; in place, if `total` is of this batch."""
        own = total is not self.total
        if rows.ndim == 2:
            return add_products(total, rows, inplace=own)
        if len(rows) == 1:
            return add_products(None if total is None else total[0], rows[0], inplace=own)[None]
        rows = rows.float()
        found = torch.bmm(rows.mT, rows)
        found = found.add(found.mT).mul_(0.5)  # symmetric to the last bit
        return found if total is None else total.add_(found) if own else total + found

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
