"""Fake quantization in training: what stands before a layer's input and its weight while the model learns.

    forward    y = s Q(x / s)                   rounded and saturated, in the dtype of x: `inc::fake_quantize`
    backward   dy/dx = 1                        straight through (Bengio et al. 2013), see each class for where it is 0

Three ways to the scale `s`:

    OwnScale      from the tensor itself, anew in each step: weights, and formats with a scale a block (MX)
    TrackedRange  from a moving average of the batches' ranges: activations in static formats (Jacob et al. 2018, 3.1)
    LearnedStep   a parameter, trained with the rest (see `learned_step`)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.calibrate import RangeEstimator
from inc_graph.errors import CalibrationError, ConfigError, TrainingError
from inc_graph.finite import refuse_bad_gradients
from inc_graph.numerics import affine_qparams
from inc_graph.ops import CHOOSE_QPARAMS, FAKE_QUANTIZE
from inc_graph.options import make_algorithm, needs_inputs
from inc_graph.spec import PerTensor, QSpec

__all__ = ["FakeQuantizer", "OwnScale", "Scale", "TrackedRange", "has_no_zero_point", "refuse_untrained", "unseen"]

RATE = 0.01  # weight of a new batch in the average, once a hundred have been seen
Scale = tuple[Tensor, Tensor | None]


class FakeQuantizer(nn.Module):
    """Rounds one value as its format will.

    Args:
        spec: The format, with the axes of this very tensor.
        what: "input" or "weight", for messages.
        path: Module path of the layer, for messages.
        check: Refuse NaN and infinity, which an integer format would turn into numbers; under `torch.compile` they are
            passed on instead, so that the loss shows them.
    """

    def __init__(self, spec: QSpec, what: str, path: str, check: bool = True) -> None:
        super().__init__()
        self.spec, self.what, self.path, self.check = spec, what, path, check
        self.watch = False  # refuse gradients that are not finite, too
        self.begins = False  # take a first range in eval mode as well
        self.guard: Any = None  # `clear()` drops the gradients of the whole model

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded, in its dtype. TrainingError if it holds NaN or infinity."""
        if torch.compiler.is_compiling():
            return torch.where(x.isfinite(), self.rounded(x), x)
        if self.check and not x.is_meta and not bool(x.detach().isfinite().all()):
            raise self._bad(x)
        y = self.rounded(x)
        if self.watch and self.check:
            refuse_bad_gradients(y, self.path, self.guard)
        return y

    def rounded(self, x: Tensor) -> Tensor:
        """`x` rounded; it is finite."""
        raise NotImplementedError

    @property
    def seen(self) -> int:
        """Training batches that the scale is from; 1 where it needs none."""
        return 1

    def freeze(self) -> None:
        """Keep the scale as it is from now on."""

    def moving(self) -> list[Tensor]:
        """State that the next training batch moves."""
        return []

    def settle(self) -> None:
        """The state was set from outside."""

    def params(self, x: Tensor | None = None) -> Scale:
        """(scale, zero point) as they are now; of `x`, where the scale is that of the tensor itself."""
        raise NotImplementedError

    def _bad(self, x: Tensor) -> TrainingError:
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        hint = (
            "an optimizer step made it so: go back to a checkpoint, and take smaller steps or clip gradients"
            if self.what == "weight"
            else "it is the first layer that meets them: look at the batch, and at what computes this input"
        )
        return TrainingError(f"the {self.what} has {nan} NaN and {inf} infinite values", module=self.path, hint=hint)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # else it is a checkpoint of the float model
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.spec}"


def has_no_zero_point(spec: QSpec) -> bool:
    """Whether it has none: symmetric codes of signed formats."""
    return spec.scheme == "symmetric" and spec.type.signed


def unseen(quantizer: FakeQuantizer) -> CalibrationError:
    """What to raise where a scale is asked for before a training batch came."""
    hint = "run training batches through the model in train mode first"
    return CalibrationError(f"the {quantizer.what} has no range yet", module=quantizer.path, hint=hint)


def refuse_untrained(quantizers: Iterable[FakeQuantizer]) -> None:
    """CalibrationError if no input of a model has seen a training batch."""
    inputs = [q for q in quantizers if q.what == "input"]
    if inputs and not any(q.seen for q in inputs):
        hint = "train it first: each training batch in train mode adds to the ranges"
        raise CalibrationError("the model has seen no training batch", hint=hint)


# ------------------------------------------------------------------------------------------------- scale of the tensor
class _OwnScale(torch.autograd.Function):
    """Round by the scale of `x` itself; the gradient goes through whole, as no value is out of a range that follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Sequence[int], qtype: str, scheme: str) -> Tensor:
        scale, zero = CHOOSE_QPARAMS(x, block, qtype, scheme)
        return FAKE_QUANTIZE(x, scale, zero, block, qtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None


class _Solved(torch.autograd.Function):
    """The values that a weight algorithm gives; gradient as above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, algorithm: Any, spec: QSpec) -> Tensor:
        if isinstance(algorithm, RangeEstimator):
            return FAKE_QUANTIZE(x, *algorithm.estimate(x, spec), spec.block(x.ndim), spec.qtype)
        return algorithm.solve(x, spec).values().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


class OwnScale(FakeQuantizer):
    """The scale is that of the tensor, found anew in each step: nothing has to be kept or frozen.

    Args:
        algorithm: Of a weight, as recipes have it; a dynamic spec goes by the least and greatest value.

    Raises:
        ConfigError: the algorithm rounds against inputs, which training does not collect.
    """

    def __init__(self, spec: QSpec, what: str, path: str, check: bool = True, algorithm: str = "minmax") -> None:
        super().__init__(spec, what, path, check)
        if needs_inputs(algorithm):
            hint = "train with rtn or minmax; or quantize the trained float model with this method"
            raise ConfigError(f"{algorithm} rounds once, against calibration data", module=path, hint=hint)
        self.algorithm = None if spec.dynamic or algorithm == "minmax" else make_algorithm(algorithm)

    def rounded(self, x: Tensor) -> Tensor:
        if self.algorithm is not None:
            return _Solved.apply(x, self.algorithm, self.spec)
        block = self.spec.block(x.ndim)
        return _OwnScale.apply(x, block, self.spec.qtype, self.spec.scheme)

    def params(self, x: Tensor | None = None) -> Scale:
        assert x is not None
        return CHOOSE_QPARAMS(x.detach(), self.spec.block(x.ndim), self.spec.qtype, self.spec.scheme)


# ------------------------------------------------------------------------------------------------------ tracked ranges
class TrackedRange(FakeQuantizer):
    """The range is a moving average over training batches; the gradient is zero where a value saturates.

    Batches count in training mode only: `low += max(1/n, 0.01) (min x - low)`, so that the first hundred weigh the
    same. In eval mode, within a model that trains, there is one: the first, if none has come before. A forward that
    gradient checkpointing repeats in the backward pass counts once.

    Buffers `low`, `high` (float32 scalars), `steps` and `frozen` (int64; 0 or 1) go into the state dict.

    Raises:
        ConfigError: the format wants more than one scale for the tensor.
    """

    low: Tensor
    high: Tensor
    steps: Tensor
    frozen: Tensor

    def __init__(self, spec: QSpec, what: str, path: str, check: bool = True, freeze_after: int | None = None) -> None:
        super().__init__(spec, what, path, check)
        if not isinstance(spec.granularity, PerTensor):
            raise ConfigError(f"a tracked range is one for the tensor, not {spec.granularity}", module=path)
        self.freeze_after = freeze_after
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.int64))  # averages of models cannot have bools

    @property
    def seen(self) -> int:
        return int(self.steps)

    def freeze(self) -> None:
        self.frozen.fill_(1)

    def moving(self) -> list[Tensor]:
        return [self.low, self.high, self.steps]

    def rounded(self, x: Tensor) -> Tensor:
        moves = self.training or (self.begins and not self.seen)
        if moves and x.numel() and not _recomputing():
            self._track(x.detach())
        elif not torch.compiler.is_compiling() and not x.is_meta and not self.seen:
            raise unseen(self)
        scale, zero = self.params()
        shape = (1,) * x.ndim
        zero = None if zero is None else zero.reshape(shape)
        return FAKE_QUANTIZE(x, scale.reshape(shape), zero, self.spec.block(x.ndim), self.spec.qtype)

    @torch.no_grad()
    def _track(self, x: Tensor) -> None:
        low, high = (v.float() for v in torch.aminmax(x))
        rate = (1.0 / (self.steps + 1)).clamp(min=RATE)
        stays = self.frozen.bool() | ~(low.isfinite() & high.isfinite())
        if self.freeze_after is not None:
            stays = stays | (self.steps >= self.freeze_after)
        self.low.copy_(torch.where(stays, self.low, self.low + rate * (low - self.low)))
        self.high.copy_(torch.where(stays, self.high, self.high + rate * (high - self.high)))
        self.steps.add_((~stays).to(torch.int64))

    def params(self, x: Tensor | None = None) -> Scale:
        scale, zero = affine_qparams(self.low, self.high, self.spec.qtype, self.spec.scheme)
        return scale, None if has_no_zero_point(self.spec) else zero

    def extra_repr(self) -> str:
        return f"{self.spec}, range=[{float(self.low):.4g}, {float(self.high):.4g}], batches={self.seen}"


def _recomputing() -> bool:
    """Whether a backward pass is running: gradient checkpointing repeats a forward there."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
