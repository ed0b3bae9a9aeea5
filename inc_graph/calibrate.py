"""Calibration: HOW ranges are estimated from data, and the module that watches a value while the user's data runs.

A :class:`RangeEstimator` is pure tensor maths: a small dictionary of tensors (the state) takes in one batch after
another (``collect``), two states combine (``merge``), and a state becomes a scale and a zero point (``solve``). The
estimators are in ``inc_graph.passes.qparams``, one a file; :func:`estimator` makes one by name. An :class:`Observer` is
the identity module that feeds one, and :func:`run_calibration` feeds the model.
"""

from __future__ import annotations

import contextlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from inc_graph.batches import Batch
from inc_graph.errors import CalibrationError, ConfigError
from inc_graph.numerics import affine_qparams, block_range
from inc_graph.registry import ALGORITHMS
from inc_graph.spec import QSpec, scale_shape
from inc_graph.weights import with_options

__all__ = ["Observer", "RangeEstimator", "State", "blocks", "estimator", "run_calibration"]

State = dict[str, Tensor]


def blocks(x: Tensor, block: Sequence[int]) -> Tensor:
    """The elements of `x` grouped by the scale they share: float32 ``[number of blocks, elements in a block]``.

    Rows are in the order of ``scale_shape(x.shape, block)``, flattened. A ragged last group is filled up with zeros.
    """
    x = x.float()
    if all(g == -1 for g in block):
        return x.reshape(1, -1)
    sizes = [max(n, 1) if g == -1 else g for n, g in zip(x.shape, block, strict=True)]
    counts = scale_shape(x.shape, block)
    missing = [c * g - n for c, g, n in zip(counts, sizes, x.shape, strict=True)]
    if any(missing):
        x = nn.functional.pad(x, [p for m in reversed(missing) for p in (0, m)])
    x = x.reshape([d for pair in zip(counts, sizes, strict=True) for d in pair])
    n = len(counts)
    return x.permute([*range(0, 2 * n, 2), *range(1, 2 * n, 2)]).reshape(math.prod(counts), -1)


def _extrema(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Least and greatest element of each block, float32, in the shape of the scale. NaN spreads."""
    per_tensor = all(g == -1 for g in block)
    low, high = torch.aminmax(x) if per_tensor else block_range(x, block)  # aminmax reads the memory once
    shape = scale_shape(x.shape, block)
    return low.float().reshape(shape), high.float().reshape(shape)


@dataclass(frozen=True)
class RangeEstimator(ABC):
    """Base of the range estimators. Subclasses are frozen dataclasses; their fields are the options.

    A subclass writes ``update`` and ``limits`` (and extends ``init`` and ``merge`` if it keeps more than the extrema).
    Nothing is changed in place: an exception or an interruption leaves the old state whole, and copies may share
    tensors.

    Every state has ``block`` (int64 ``[ndim]``) and ``min`` and ``max``: float32, in the shape of the scale once there
    was data. A new state is neutral in ``merge``.
    """

    name: ClassVar[str]
    batches: ClassVar[bool] = True
    """Whether it takes in more than one tensor, as activations need."""

    def init(self, qspec: QSpec, ndim: int) -> State:
        """State before any data, for values with `ndim` dimensions.

        Raises:
            SpecError: if the granularity does not fit the rank.
            ConfigError: if `qspec` is dynamic.
        """
        if qspec.dynamic:
            raise ConfigError("a dynamic spec finds its scale at run time, so there is nothing to calibrate")
        block = torch.tensor(qspec.block(ndim), dtype=torch.int64)
        inf = torch.full((1,) * ndim, math.inf)
        return {"block": block, "min": inf, "max": -inf}

    def collect(self, state: State, x: Tensor) -> State:
        """State after one more batch `x` (any float dtype, any device). An empty batch changes nothing.

        Raises:
            CalibrationError: if `x` holds NaN or infinity, or its rank or number of scales is not as before.
        """
        block = state["block"].tolist()
        if x.ndim != len(block):
            raise CalibrationError(f"the value has {x.ndim} dimensions {list(x.shape)}, and had {len(block)} before")
        if x.numel() == 0:
            return state
        if state["min"].device != x.device:
            state = {key: value.to(x.device) for key, value in state.items()}
        low, high = _extrema(x, block)
        seen = state["min"].shape
        if seen != low.shape and bool((state["min"] < math.inf).any()):
            raise CalibrationError(f"there were scales for {list(seen)} before, and now {list(low.shape)} are needed")
        if not bool((low.isfinite() & high.isfinite()).all()):
            nan, inf = int(x.isnan().sum()), int(x.float().isinf().sum())
            raise CalibrationError(f"{nan} NaN and {inf} infinite values of {x.numel()}")
        return self.update(state, x, low, high)

    @abstractmethod
    def update(self, state: State, x: Tensor, low: Tensor, high: Tensor) -> State:
        """``collect`` after its checks. `x` is finite and not empty, `low` and `high` are its extrema per scale."""

    def merge(self, a: State, b: State) -> State:
        """State as if the batches of `a`, then those of `b`, had been collected by one. Raises as ``collect``."""
        if not torch.equal(a["block"], b["block"]):
            raise CalibrationError(f"states for blocks {a['block'].tolist()} and {b['block'].tolist()} do not merge")
        if a["min"].shape != b["min"].shape and not (self.is_empty(a) or self.is_empty(b)):
            raise CalibrationError(f"states for {list(a['min'].shape)} and {list(b['min'].shape)} scales do not merge")
        low, high = torch.minimum(a["min"], b["min"]), torch.maximum(a["max"], b["max"])
        return {"block": a["block"], "min": low, "max": high}

    @abstractmethod
    def limits(self, state: State, qspec: QSpec) -> tuple[Tensor, Tensor]:
        """The range to represent: (low, high), float32, shaped like the scale. `state` has seen data."""

    def solve(self, state: State, qspec: QSpec) -> tuple[Tensor, Tensor]:
        """(scale float32, zero_point int32), each with one entry per block and as many dimensions as the value.

        Raises:
            CalibrationError: if the state has seen no data.
        """
        if self.is_empty(state):
            raise CalibrationError("saw no data")
        low, high = self.limits(state, qspec)
        return affine_qparams(low, high, qspec.qtype, qspec.scheme)

    def estimate(self, x: Tensor, qspec: QSpec) -> tuple[Tensor, Tensor]:
        """``solve`` for one tensor, such as a weight. Raises as ``collect`` and ``solve``."""
        return self.solve(self.collect(self.init(qspec, x.ndim), x), qspec)

    @staticmethod
    def is_empty(state: State) -> bool:
        """True if no data has been collected."""
        return not bool((state["min"] < math.inf).any())


def estimator(name: str, **options: Any) -> RangeEstimator:
    """The range estimator registered as `name`, with options.

    Raises:
        UnknownNameError: no algorithm has that name.
        ConfigError: the algorithm does not estimate ranges, or an option is unknown or has an illegal value.
    """
    cls = ALGORITHMS.get(name)
    if not (isinstance(cls, type) and issubclass(cls, RangeEstimator)):
        known = [n for n, c in ALGORITHMS.items() if isinstance(c, type) and issubclass(c, RangeEstimator)]
        raise ConfigError(f"{name!r} does not estimate ranges", hint=f"these do: {', '.join(known)}")
    return with_options("range estimator", name, cls, options)


class Observer(nn.Module):
    """Identity on one value of the graph that collects its range (and, if asked, its mean per channel).

    Args:
        estimator: The range estimator, or its registered name.
        qspec: How the value is to be quantized; not dynamic.
        node: Name of the observed graph node, for messages.
        module: Module path of that node, for messages.
        channel_mean: Also collect the mean of each index of dimension `axis` (for bias correction).
        axis: The channel dimension of ``channel_mean``.

    The state is in buffers ``state_*`` that exist from the first batch on. ``enabled = False`` makes it a bare
    identity. ``calls`` and ``elements`` count what was taken in; ``saw_nan`` and ``saw_inf`` stay set once such a value
    was refused.
    """

    def __init__(
        self, estimator: RangeEstimator | str, qspec: QSpec, node: str = "", module: str = "", *,
        channel_mean: bool = False, axis: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.estimator = _by_name(estimator) if isinstance(estimator, str) else estimator
        if not isinstance(self.estimator, RangeEstimator):
            raise ConfigError(f"not a range estimator: {estimator!r}", node=node, module=module)
        if qspec.dynamic:
            raise ConfigError("a dynamic spec needs no observer", node=node, module=module)
        self.qspec, self.node, self.module_path = qspec, node, module
        self.axis = axis if channel_mean else None
        self.enabled = True
        self.batch: Batch | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all data."""
        for name in self._buffers.copy():
            del self._buffers[name]
        self.calls = self.elements = 0
        self.saw_nan = self.saw_inf = False

    def snapshot(self) -> tuple[dict[str, Tensor | None], int, int]:
        """What was collected; nothing is copied, as nothing is changed in place."""
        return dict(self._buffers), self.calls, self.elements

    def restore(self, state: tuple[dict[str, Tensor | None], int, int]) -> None:
        """Back to a snapshot. What was refused stays known (`saw_nan`, `saw_inf`)."""
        buffers, self.calls, self.elements = state
        self._buffers.clear()
        self._buffers.update(buffers)

    @property
    def state(self) -> State:
        """The estimator's state; empty before the first batch."""
        prefix = "state_"
        return {k.removeprefix(prefix): v for k, v in self._buffers.items() if k.startswith(prefix) and v is not None}

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself.

        Raises:
            CalibrationError: `x` is not floating point, holds NaN or infinity, or its rank or channels changed.
        """
        if self.enabled and not (isinstance(x, FakeTensor) or getattr(x, "is_meta", False)):
            with torch.inference_mode(False), torch.no_grad():
                self._collect(x)
        return x

    def _collect(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise self._error(f"the value to observe is {kind}, not floating point", "only float tensors are quantized")
        if self.batch is not None:
            self.batch.note(self)
        x = x.detach()
        state = self.state or self.estimator.init(self.qspec, x.ndim)
        try:
            if type(self.estimator).collect is not RangeEstimator.collect and not bool(x.isfinite().all()):
                raise CalibrationError("NaN or infinite values")  # an extension may do without the check
            state = self.estimator.collect(state, x)
        except CalibrationError as e:
            nan, inf = bool(x.isnan().any()), bool(x.float().isinf().any())
            self.saw_nan, self.saw_inf = self.saw_nan or nan, self.saw_inf or inf
            hint = "check that batch, or keep this operator in float" if nan or inf else "use one input layout"
            raise self._error(f"calibration batch {self.calls + 1}: {e.message}", e.hint or hint) from e
        new = {f"state_{key}": value for key, value in state.items()}
        if self.axis is not None and x.numel():
            new |= self._add_to_mean(x, self.axis)
        self._buffers.update(new)  # one step, so that an interruption leaves old or new, never half
        self.calls, self.elements = self.calls + 1, self.elements + x.numel()

    def _add_to_mean(self, x: Tensor, axis: int) -> State:
        if not -x.ndim <= axis < x.ndim:
            raise self._error(f"a mean along axis {axis} of a value of shape {list(x.shape)}", "give another axis")
        dims = [d for d in range(x.ndim) if d != axis % x.ndim]
        total = x.sum(dims, dtype=torch.float64) if dims else x.double()
        count = torch.tensor(x.numel() // total.numel())
        if (old := self._buffers.get("mean_sum")) is not None:
            if old.shape != total.shape:
                raise self._error(f"the value had {old.numel()} channels before and has {total.numel()} now", None)
            total, count = total + old, count + self._buffers["mean_count"]  # type: ignore[operator]
        return {"mean_sum": total, "mean_count": count}

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale float32, zero_point int32), shaped as ``RangeEstimator.solve`` says. CalibrationError without data."""
        self._need_data()
        return self.estimator.solve(self.state, self.qspec)

    def mean(self) -> Tensor:
        """Mean of each channel over all data: float32 ``[channels]``. CalibrationError if there is none."""
        if self.axis is None:
            raise self._error("the mean was not collected", "make the observer with channel_mean=True")
        self._need_data()
        return (self.get_buffer("mean_sum") / self.get_buffer("mean_count")).float()

    def _need_data(self) -> None:
        if self.elements == 0:
            raise self._error("saw no data", "run calibration data through the prepared model before converting it")

    def _error(self, message: str, hint: str | None) -> CalibrationError:
        return CalibrationError(message, node=self.node or None, module=self.module_path, hint=hint)

    def extra_repr(self) -> str:
        where = f"{self.node!r}" + (f" in {self.module_path!r}" if self.module_path else "")
        seen = f"calls={self.calls}"
        if self.elements:
            seen += f", range=[{self.get_buffer('state_min').min():.4g}, {self.get_buffer('state_max').max():.4g}]"
        return f"{where}, {self.estimator}, {self.qspec}, {seen}{'' if self.enabled else ', disabled'}"


_by_name = estimator  # Observer's parameter of the same name hides the function


def run_calibration(
    model: nn.Module,
    data: Iterable[Any],
    *,
    steps: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool | None = None,
) -> int:
    """Run calibration data through a prepared model, without gradients.

    Args:
        model: Called on every batch: ``model(x)``, ``model(*x)`` for a tuple or list, ``model(**x)`` for a mapping.
        data: Batches: a DataLoader, a list, a generator.
        steps: Stop after so many batches; None: use all.
        forward: ``forward(model, batch)`` does the call instead (for labels, devices, ``generate``).
        progress: Show a bar with the time left; None: only if stderr is a terminal.

    Returns:
        The number of batches run. If it is interrupted, the observers keep what whole batches gave them.

    Raises:
        CalibrationError: there was not one batch; or what the observers raise.
        ConfigError: `data` is a single tensor or mapping or not iterable, or `steps` is not positive.
    """
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        hint = "pass a list of batches, such as [batch]"
        raise ConfigError(f"calibration data must be an iterable of batches, not one {type(data).__name__}", hint=hint)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"steps must be a positive integer or None, not {steps!r}")
    call = forward or _call
    count = 0
    with _bar(data, steps, progress) as advance, torch.no_grad():
        for batch in data:
            try:
                call(model, batch)
            except TypeError as e:
                if forward is None and hasattr(e, "add_note"):
                    e.add_note(f"in calibration batch {count + 1}; forward=lambda model, batch: ... can pick its parts")
                raise
            count += 1
            advance()
            if count == steps:
                break
    if count == 0:
        raise CalibrationError("the calibration data is empty", hint="a generator can be used only once; pass a list")
    return count


def _call(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextlib.contextmanager
def _bar(data: Iterable[Any], steps: int | None, show: bool | None) -> Iterator[Callable[[], None]]:
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    try:
        size: int | None = len(data)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader over one
        size = None
    total = min((n for n in (size, steps) if n is not None), default=None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrating", total=total)
        yield lambda: bar.advance(task)
