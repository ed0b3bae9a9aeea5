"""What is collected of the input of layers, channel by channel: what smoothing needs of the calibration data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from inc_graph.batches import Batch
from inc_graph.errors import CalibrationError

__all__ = ["CALLS", "ROWS", "ChannelObserver", "Recalls", "channels_last"]

CALLS = "inc_recalls"
"""Key of the `meta` of an observed graph under which `smooth-quant` finds `Recalls`, and takes them out."""

ROWS = 512
"""Rows of a linear layer's input that are kept to judge candidates on, taken evenly from all that are offered."""

_ELEMENTS = 1 << 20  # of the maps that are kept for a convolution


class _Seen(NamedTuple):
    """Nothing in it is changed in place."""

    low: Tensor | None = None
    high: Tensor | None = None
    kept: tuple[Tensor, ...] = ()
    every: int = 1  # each so many-th row is kept
    offered: int = 0
    samples: int = 0
    calls: int = 0
    elements: int = 0


class Recalls(NamedTuple):
    """Calibration calls that can be run again: a value for each placeholder. `grams`: collect outer products too."""

    calls: list[list[Any]]
    grams: bool = True


def channels_last(x: Tensor, axis: int) -> Tensor:
    """`x` as rows [n, channels] of dimension `axis`."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


class ChannelObserver(nn.Module):
    """Identity that collects the least and the greatest value of each channel, and keeps some of the data.

    Args:
        axis: The channels' dimension: -1 for linear layers, 1 for convolutions.
        samples: Entries of the first dimension of what calls bring that are offered to be kept; 0 keeps nothing.
        node, module: Of the layer, for messages.

    Attributes:
        enabled: False makes it a bare identity.
    """

    def __init__(self, axis: int, samples: int, node: str = "", module: str = "") -> None:
        super().__init__()
        self.axis, self.samples, self.node, self.module_path = axis, samples, node, module
        self.enabled = True
        self.batch: Batch | None = None
        self.seen = _Seen()

    @property
    def elements(self) -> int:
        """Numbers that were taken in."""
        return self.seen.elements

    def reset(self) -> None:
        """Forget all data."""
        self.seen = _Seen()

    def snapshot(self) -> _Seen:
        """What was collected; nothing is copied, as nothing is changed in place."""
        return self.seen

    def restore(self, state: _Seen) -> None:
        """Back to a snapshot."""
        self.seen = state

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself. CalibrationError on NaN, infinity, or another number of channels than before."""
        if self.enabled and not (isinstance(x, FakeTensor) or x.is_meta) and x.numel():
            with torch.inference_mode(False), torch.no_grad():
                self._take(x.detach())
        return x

    def _take(self, x: Tensor) -> None:
        if self.batch is not None:
            self.batch.note(self)
        low, high = (t.float() for t in channels_last(x, self.axis).aminmax(dim=0))
        seen = self.seen
        if not bool((low.isfinite() & high.isfinite()).all()):
            text = f"calibration batch {seen.calls + 1}: NaN or infinite values"
            raise self._error(text, "check that batch, or keep this operator in float")
        if seen.low is not None and seen.high is not None:
            if seen.low.shape != low.shape:
                raise self._error(f"the value had {len(seen.low)} channels before and has {len(low)} now", None)
            low, high = torch.minimum(seen.low, low), torch.maximum(seen.high, high)
        self.seen = self._kept(x, seen)._replace(
            low=low, high=high, calls=seen.calls + 1, elements=seen.elements + x.numel()
        )

    def _kept(self, x: Tensor, seen: _Seen) -> _Seen:
        left = self.samples - seen.samples
        if left <= 0:
            return seen
        part = x[:left] if x.ndim > 1 else x[None]
        samples = seen.samples + len(part)
        rows = part.reshape(-1, x.shape[-1]) if self.axis == -1 else part
        limit = ROWS if self.axis == -1 else max(1, _ELEMENTS // max(rows[0].numel(), 1))
        first = -seen.offered % seen.every
        kept = [*seen.kept, *rows[first :: seen.every].float().split(1)] if self.axis != -1 else list(seen.kept)
        if self.axis == -1 and first < len(rows):
            kept.append(rows[first :: seen.every].float().clone())
        every, offered = seen.every, seen.offered + len(rows)
        while sum(map(len, kept)) > limit:
            kept, every = ([torch.cat(kept)[::2].clone()] if self.axis == -1 else kept[::2]), every * 2
            if len(kept) == 1 and self.axis != -1:
                break
        return seen._replace(kept=tuple(kept), every=every, offered=offered, samples=samples)

    def ranges(self) -> tuple[Tensor, Tensor]:
        """(least, greatest) value of each channel over all data: float32 [channels]. CalibrationError without data."""
        if self.seen.low is None or self.seen.high is None:
            hint = "run calibration data through the prepared model before converting it"
            raise self._error("saw no data", hint)
        return self.seen.low, self.seen.high

    def kept(self) -> list[Tensor]:
        """What was kept: one tensor [rows, channels]; of a convolution maps, each with a batch dimension of 1."""
        return [torch.cat(self.seen.kept)] if self.axis == -1 and self.seen.kept else list(self.seen.kept)

    def calculate_qparams(self) -> Any:
        """As `ranges`: what every observer has, to ask whether it has seen data."""
        return self.ranges()

    def _error(self, message: str, hint: str | None) -> CalibrationError:
        return CalibrationError(message, node=self.node or None, module=self.module_path, hint=hint)

    def extra_repr(self) -> str:
        return f"{self.node!r}, axis={self.axis}, calls={self.seen.calls}"
