"""Fake quantization in training: what stands before a layer's input and its weight while the model learns.

    forward    y = s Q(x / s)                   rounded and saturated, in the dtype of x: `inc::fake_quantize`
    backward   dy/dx = 1                        straight through (Bengio et al. 2013), see each class for where it is 0

Three ways to the scale `s`:

    OwnScale      from the tensor itself, anew in each step: weights, and formats with a scale a block (MX)
    TrackedRange  from a moving average of the batches' ranges: activations in static formats (Jacob et al. 2018, 3.1)
    LearnedStep   a parameter, trained with the rest (LSQ: Esser et al. 2020)

What was trained goes on as a `TrainedObserver`, which an observed graph takes for one that has seen data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.calibrate import Observer, RangeEstimator
from inc_graph.errors import CalibrationError, ConfigError, TrainingError
from inc_graph.numerics import MIN_SCALE, affine_qparams, block_reduce
from inc_graph.ops import CHOOSE_QPARAMS, FAKE_QUANTIZE
from inc_graph.options import make_algorithm, needs_inputs
from inc_graph.spec import PerTensor, QSpec, scale_shape

__all__ = [
    "TRAINED", "FakeQuantizer", "LearnedStep", "OwnScale", "TrackedRange", "TrainedObserver", "quantizer_for",
    "refuse_bad_gradients",
]  # fmt: skip

TRAINED = "inc_trained"  # in `gm.meta`: {name of a layer: (scale, zero point) that were learned for its weight}
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
    same. A forward that gradient checkpointing repeats in the backward pass counts once.

    Buffers `low`, `high` (float32 scalars), `steps` (int64) and `frozen` (bool) go into the state dict.

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
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))

    @property
    def seen(self) -> int:
        return int(self.steps)

    def freeze(self) -> None:
        self.frozen.fill_(True)

    def moving(self) -> list[Tensor]:
        return [self.low, self.high, self.steps]

    def rounded(self, x: Tensor) -> Tensor:
        if self.training and x.numel() and not _recomputing():
            self._track(x.detach())
        elif not torch.compiler.is_compiling() and not x.is_meta and not self.seen:
            raise _unseen(self)
        scale, zero = self.params()
        shape = (1,) * x.ndim
        zero = None if zero is None else zero.reshape(shape)
        return FAKE_QUANTIZE(x, scale.reshape(shape), zero, self.spec.block(x.ndim), self.spec.qtype)

    @torch.no_grad()
    def _track(self, x: Tensor) -> None:
        low, high = (v.float() for v in torch.aminmax(x))
        rate = (1.0 / (self.steps + 1)).clamp(min=RATE)
        stays = self.frozen | ~(low.isfinite() & high.isfinite())
        if self.freeze_after is not None:
            stays = stays | (self.steps >= self.freeze_after)
        self.low.copy_(torch.where(stays, self.low, self.low + rate * (low - self.low)))
        self.high.copy_(torch.where(stays, self.high, self.high + rate * (high - self.high)))
        self.steps.add_((~stays).to(torch.int64))

    def params(self, x: Tensor | None = None) -> Scale:
        scale, zero = affine_qparams(self.low, self.high, self.spec.qtype, self.spec.scheme)
        return scale, None if _no_zero_point(self.spec) else zero

    def extra_repr(self) -> str:
        return f"{self.spec}, range=[{float(self.low):.4g}, {float(self.high):.4g}], batches={self.seen}"


# -------------------------------------------------------------------------------------------------------- learned step
class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


class LearnedStep(FakeQuantizer):
    """The scale is a parameter `step`, shaped like the scale; LSQ (Esser et al. 2020), equations 3 and 5.

    Its gradient is scaled by ``1 / sqrt(n qmax)``, n the weights (or the features of one sample) that share it. It
    begins at ``2 mean|x| / sqrt(qmax)`` in symmetric formats, at the range of the first training batch in asymmetric
    ones, whose zero point stays what it is then. Processes of one group begin with the mean over all of them.

    Raises:
        ConfigError: the format's scales are powers of two, or found as the model runs.
    """

    zero_point: Tensor
    ready: Tensor
    frozen: Tensor

    def __init__(self, spec: QSpec, what: str, path: str, check: bool = True, weight: Tensor | None = None) -> None:
        super().__init__(spec, what, path, check)
        if spec.dynamic or spec.type.scale_format != "float32":
            hint = "train it with learn_scales=False"
            raise ConfigError(f"the scales of {spec.qtype} cannot be learned", module=path, hint=hint)
        if weight is None and not isinstance(spec.granularity, PerTensor):
            raise ConfigError(f"one step is learned for an input, not {spec.granularity}", module=path)
        shape = () if weight is None else scale_shape(weight.shape, spec.block(weight.ndim))
        device = None if weight is None else weight.device
        self.step = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool, device=device))
        self._begun = False  # the same, without asking a tensor: what is compiled can depend on it
        if weight is not None:
            self._begin(weight.detach())

    @property
    def seen(self) -> int:
        return int(self.ready)

    def freeze(self) -> None:
        self.step.requires_grad_(False)

    def moving(self) -> list[Tensor]:
        return [] if self._begun else [self.step, self.zero_point, self.ready]

    def settle(self) -> None:
        self._begun = bool(self.ready)

    def rounded(self, x: Tensor) -> Tensor:
        if not self._begun and not x.is_meta:
            if self.training:
                self._begin(x.detach(), together=True)
            elif not torch.compiler.is_compiling():
                raise _unseen(self)
        per_sample = x.numel() // max(len(x), 1) if self.what == "input" and x.ndim > 1 else x.numel()
        shared = max(per_sample // max(self.step.numel(), 1), 1)
        scale, zero = self.params()
        top = max(abs(float(self.spec.type.qmax)), 1.0)
        scale = _ScaledGradient.apply(scale, (shared * top) ** -0.5)
        if self.step.ndim != x.ndim:
            shape = (1,) * x.ndim
            scale, zero = scale.reshape(shape), None if zero is None else zero.reshape(shape)
        return FAKE_QUANTIZE(x, scale, zero, self.spec.block(x.ndim), self.spec.qtype)

    @torch.no_grad()
    def _begin(self, x: Tensor, together: bool = False) -> None:
        if not x.numel():
            return
        x = torch.where(x.isfinite(), x, 0.0)  # where they are not refused, they say nothing of the scale
        block = self.spec.block(x.ndim)
        scale, zero = CHOOSE_QPARAMS(x, block, self.spec.qtype, self.spec.scheme)
        if self.spec.scheme == "symmetric":
            mean = _mean_of_blocks(x.float().abs(), scale, block)
            learned = 2 * mean / max(abs(float(self.spec.type.qmax)), 1.0) ** 0.5
            scale = torch.where(learned > MIN_SCALE, learned, scale)
        scale, zero = scale.reshape(self.step.shape), zero.reshape(self.step.shape)
        if together and torch.distributed.is_available() and torch.distributed.is_initialized():
            both = torch.stack([scale.double(), zero.double()])
            torch.distributed.all_reduce(both)
            both /= torch.distributed.get_world_size()
            scale, zero = both[0].float(), both[1].round().int()
        self.step.copy_(scale)
        self.zero_point.copy_(zero)
        self.ready.fill_(True)
        self._begun = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.settle()

    def params(self, x: Tensor | None = None) -> Scale:
        scale = self.step.float().abs().clamp(min=MIN_SCALE)
        return scale, None if _no_zero_point(self.spec) else self.zero_point


def _mean_of_blocks(x: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    total = block_reduce(x, block, "sum")
    return total / block_reduce(torch.ones_like(x), block, "sum").reshape(scale.shape)


# ------------------------------------------------------------------------------------------------------------ together
def quantizer_for(
    spec: QSpec, algorithm: str, weight: Tensor | None, path: str, learn_scales: bool, freeze_after: int | None,
    check: bool,
) -> FakeQuantizer:  # fmt: skip
    """The fake quantizer of a weight, or of an input (`weight` None).

    Raises:
        ConfigError: this format, or this algorithm, cannot be trained for.
    """
    what = "input" if weight is None else "weight"
    learned = learn_scales and not spec.dynamic and spec.type.scale_format == "float32"
    if learned and (weight is None or algorithm == "minmax"):
        return LearnedStep(spec, what, path, check, weight)
    if weight is None and not spec.dynamic:
        return TrackedRange(spec, what, path, check, freeze_after)
    return OwnScale(spec, what, path, check, algorithm)


class TrainedObserver(Observer):
    """What training has found, as an observer that has seen data.

    Args:
        scale, zero_point: Of one value.
        seen: Batches that they are from; 0 where there were none.
    """

    def __init__(self, qspec: QSpec, scale: Scale, seen: int, node: str = "", module: str = "") -> None:
        super().__init__("minmax", qspec, node, module)
        self.enabled = False
        self.calls = self.elements = seen
        self.scale = scale

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point) of training."""
        self._need_data()
        scale, zero = (None if t is None else t.detach().clone().reshape(1) for t in self.scale)
        assert scale is not None
        return scale.float(), torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero


def refuse_bad_gradients(y: Tensor, path: str, guard: Any = None) -> None:
    """Let the backward pass refuse a gradient of `y` that is not finite, before any optimizer can use it.

    Not where float16 is computed in: a gradient scaler lets such a step overflow, and drops it. `path` is "" for the
    output of the model; `guard.clear()` drops the gradients that are there by then.
    """
    kind = y.device.type
    half = kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if not y.requires_grad or y.dtype == torch.float16 or half:
        return

    def look(grad: Tensor) -> None:
        if bool(grad.isfinite().all()):
            return
        if guard is not None:
            guard.clear()
        where = "the layer" if path else "the model's output"
        hint = (
            "it began behind this layer, and not behind the next one that is quantized"
            if path
            else "the loss is NaN or infinite: take smaller steps, or look at the batch and the loss"
        )
        raise TrainingError(f"the gradient that comes back to {where} is not finite", module=path, hint=hint)

    y.register_hook(look)
    if not path:  # the last layer may look at the same tensor: it comes after, so that the loss is named
        hooks: Any = y._backward_hooks
        for key in list(hooks)[:-1]:
            hooks[key] = hooks.pop(key)


def _no_zero_point(spec: QSpec) -> bool:
    """Symmetric codes of signed formats have none."""
    return spec.scheme == "symmetric" and spec.type.signed


def _unseen(quantizer: FakeQuantizer) -> CalibrationError:
    hint = "run training batches through the model in train mode first"
    return CalibrationError(f"the {quantizer.what} has no range yet", module=quantizer.path, hint=hint)


def _recomputing() -> bool:
    """Whether a backward pass is running: gradient checkpointing repeats a forward there."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
