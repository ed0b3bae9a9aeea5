"""What is collected of the input of layers, channel by channel: what smoothing needs of the calibration data."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from inc_graph.batches import Batch
from inc_graph.errors import CalibrationError

__all__ = ["CALLS", "PARTS", "ROWS", "ChannelObserver", "Recalls", "Without", "channels_last"]

CALLS = "inc_recalls"
"""Key of the `meta` of an observed graph under which `smooth-quant` finds `Recalls`, and takes them out."""

ROWS = 512
"""Rows of a linear layer's input that are kept to judge candidates on, taken evenly from all that are offered."""

PARTS = 8
"""Parts of the data, call by call in turns, whose ranges are known apart."""

_ELEMENTS = 1 << 20  # of the maps that are kept for a convolution


Range = tuple[Tensor, Tensor]  # least and greatest value of each channel


def _wider(a: Range | None, b: Range) -> Range:
    return b if a is None else (torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1]))


class _Half(NamedTuple):
    """What one half of the data brought. Nothing in it is changed in place."""

    range: Range | None = None
    kept: tuple[Tensor, ...] = ()
    every: int = 1  # each so many-th row is kept
    offered: int = 0


class Without(NamedTuple):
    """All of the data but the calls with this number, modulo `PARTS`."""

    part: int


class _Seen(NamedTuple):
    halves: tuple[_Half, _Half] = (_Half(), _Half())
    parts: tuple[Range, ...] = ()
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

    It does so for two halves of the data, so that what is chosen on one can be judged on the other: of each call the
    first and the second half of its samples; calls with one sample in turns.

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
        seen, halves = self.seen, list(self.seen.halves)
        x = x if x.ndim > 1 else x[None]
        taken = x[: max(self.samples - seen.samples, 0)]
        cut, number, parts = len(x) // 2, seen.calls % PARTS, dict(enumerate(seen.parts))
        pieces = [(seen.calls % 2, x, taken)] if len(x) == 1 else [(0, x[:cut], taken[:cut]), (1, x[cut:], taken[cut:])]
        for at, own, offered in pieces:
            found = self._range(own)
            parts[number] = _wider(parts.get(number), found)
            half = halves[at]._replace(range=_wider(halves[at].range, found))
            halves[at] = self._keep(half, offered) if len(offered) else half
        counts = seen.samples + len(taken), seen.calls + 1, seen.elements + x.numel()
        self.seen = _Seen((halves[0], halves[1]), tuple(parts.values()), *counts)

    def _range(self, x: Tensor) -> Range:
        rows = channels_last(x, self.axis)
        low, high = rows.amin(0).float(), rows.amax(0).float()  # a quarter of the time of aminmax
        if not bool((low.isfinite() & high.isfinite()).all()):
            text = f"calibration batch {self.seen.calls + 1}: NaN or infinite values"
            raise self._error(text, "check that batch, or keep this operator in float")
        for other in self.seen.parts:
            if other[0].shape != low.shape:
                raise self._error(f"the value had {len(other[0])} channels before and has {len(low)} now", None)
        return low, high

    def _keep(self, half: _Half, x: Tensor) -> _Half:
        """Some of the rows: evenly taken, and so many as are allowed. Of a convolution whole maps are rows."""
        rows = x.reshape(-1, x.shape[-1]) if self.axis == -1 else x
        limit = max(1, min(ROWS // 2, _ELEMENTS // max(rows[0].numel(), 1)) if self.axis != -1 else ROWS // 2)
        every, kept = half.every, half.kept
        some = rows[-half.offered % every :: every].float()
        kept = (*kept, some.clone()) if len(some) else kept
        while sum(map(len, kept)) > limit:
            sizes = {x.shape[1:] for x in kept}
            kept, every = (torch.cat(kept)[::2].clone(),) if len(sizes) == 1 else kept[::2], every * 2
            if len(sizes) > 1 and len(kept) == 1:
                break
        return half._replace(kept=kept, every=every, offered=half.offered + len(rows))

    def ranges(self, share: int | Without | None = None) -> Range:
        """(least, greatest) value of each channel, of all data, of one half, or without a part of the calls (unless
        there is no other): float32 [channels].

        CalibrationError without data.
        """
        parts, halves = self.seen.parts, self.seen.halves
        if isinstance(share, Without):
            found = [p for i, p in enumerate(parts) if i != share.part % PARTS] or [*parts]
        else:
            found = [h.range for i, h in enumerate(halves) if share in (None, i) and h.range is not None]
        if not found:
            hint = "run calibration data through the prepared model before converting it"
            raise self._error("saw no data", hint)
        lows, highs = zip(*found, strict=True)
        return torch.stack(lows).amin(0), torch.stack(highs).amax(0)

    def scaled(self, scale: Tensor) -> ChannelObserver:
        """An observer that has seen the same data, each channel divided by its scale (float32 [channels], above 0)."""
        new = ChannelObserver(self.axis, self.samples, self.node, self.module_path)
        new.enabled, new.batch = self.enabled, self.batch

        def by(x: Tensor) -> Tensor:
            return x / scale.to(x.device).view([-1 if d == self.axis % x.ndim else 1 for d in range(x.ndim)])

        def both(r: Range) -> Range:
            return r[0] / scale.to(r[0].device), r[1] / scale.to(r[1].device)

        first, second = (
            h._replace(range=None if h.range is None else both(h.range), kept=tuple(map(by, h.kept)))
            for h in self.seen.halves
        )
        new.seen = self.seen._replace(halves=(first, second), parts=tuple(map(both, self.seen.parts)))
        return new

    def kept(self, half: int | None = None) -> list[Tensor]:
        """What was kept, of all data or one half: a tensor [rows, channels]; of a convolution [maps, channels, ...].

        There are several if the maps differ in size, none if nothing was kept.
        """
        parts = [x for i, h in enumerate(self.seen.halves) if half in (None, i) for x in h.kept]
        sizes = dict.fromkeys(x.shape[1:] for x in parts)
        return [torch.cat([x for x in parts if x.shape[1:] == size]) for size in sizes]

    @property
    def two_halves(self) -> bool:
        """Whether both halves brought data, and some of it was kept."""
        return all(h.kept for h in self.seen.halves)

    def calculate_qparams(self) -> Any:
        """As `ranges`: what every observer has, to ask whether it has seen data."""
        return self.ranges()

    def _error(self, message: str, hint: str | None) -> CalibrationError:
        return CalibrationError(message, node=self.node or None, module=self.module_path, hint=hint)

    def extra_repr(self) -> str:
        return f"{self.node!r}, axis={self.axis}, calls={self.seen.calls}"
