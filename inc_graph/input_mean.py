"""The mean of a layer's input, collected beside its range: what bias correction needs of the calibration data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from inc_graph.batches import Batch
from inc_graph.errors import CalibrationError, ConfigError

__all__ = ["MeanObserver"]


class MeanObserver(nn.Module):
    """Identity that collects the mean of a layer's input, for bias correction.

    Args:
        kind: "channels": mean over all dimensions but the last, ``[channels]``. "map": mean over the batch only,
            ``[channels, *spatial]``; if batches come in several sizes, mean over batch and space, ``[channels, 1,
            ...]``.
        node, module: The layer, for messages.

    Attributes:
        count: Rows that the mean is over.
        enabled: False makes it a bare identity.
        varied: True once maps of several sizes came in.
    """

    def __init__(self, kind: str, node: str = "", module: str = "") -> None:
        super().__init__()
        if kind not in ("channels", "map"):
            raise ConfigError(f"kind must be 'channels' or 'map', not {kind!r}")
        self.kind, self.node, self.module_path = kind, node, module
        self.count, self.varied = 0, False
        self.enabled = True
        self.batch: Batch | None = None
        self.total: Tensor | None
        self.register_buffer("total", None)

    def snapshot(self) -> tuple[Tensor | None, int, bool]:
        """What was collected; nothing is copied, as nothing is changed in place."""
        return self.total, self.count, self.varied

    def restore(self, state: tuple[Tensor | None, int, bool]) -> None:
        """Back to a snapshot."""
        self.total, self.count, self.varied = state

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        if self.enabled and not (isinstance(x, FakeTensor) or x.is_meta) and x.numel():
            with torch.inference_mode(False), torch.no_grad():
                self._add(x.detach())
        return x

    def _add(self, x: Tensor) -> None:
        if self.batch is not None:
            self.batch.note(self)
        rows = x.reshape(-1, x.shape[-1]) if self.kind == "channels" else x
        total = rows.sum(0, dtype=torch.float64)
        if self.total is not None and (self.varied or self.total.shape != total.shape):
            space = list(range(1, total.ndim))
            # every row counts the same, whatever its size
            total, old = total.mean(space, keepdim=True), self.total.mean(space, keepdim=True)
            self.total, self.varied = old + total, True
        else:
            self.total = total if self.total is None else self.total + total
        self.count += len(rows)

    def mean(self) -> Tensor:
        """The mean, float32, shaped as `kind` says. CalibrationError without data."""
        if self.total is None:
            raise CalibrationError(
                "saw no data", node=self.node or None, module=self.module_path,
                hint="run calibration data through the prepared model before converting it",
            )  # fmt: skip
        return (self.total / self.count).float()

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.node!r}, rows={self.count}"
