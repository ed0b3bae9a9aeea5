"""A scale that is trained with the rest (LSQ: Esser et al. 2020), and that says in a checkpoint for which format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inc_graph.errors import ConfigError, IncError
from inc_graph.fake_quantizer import FakeQuantizer, Scale, has_no_zero_point, unseen
from inc_graph.numerics import MIN_SCALE, block_reduce
from inc_graph.ops import CHOOSE_QPARAMS, FAKE_QUANTIZE
from inc_graph.spec import PerTensor, QSpec, scale_shape

__all__ = ["LearnedStep", "format_in", "other_format"]


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
        self.register_buffer("ready", torch.zeros((), dtype=torch.int64, device=device))
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
        if not self._begun and not x.is_meta and not torch.compiler.is_compiling():
            self.settle()  # an average of models is written into its tensors
        if not self._begun and not x.is_meta:
            if self.training or self.begins:
                self._begin(x.detach(), together=True)
            elif not torch.compiler.is_compiling():
                raise unseen(self)
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
        self.ready.fill_(1)
        self._begun = True

    def get_extra_state(self) -> Tensor:
        """The format that the step is for: JSON in UTF-8, uint8 [bytes]. A tensor, since files hold nothing else."""
        return torch.tensor(list(json.dumps(self.spec.to_json()).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """ConfigError if it is another format than this one's."""
        found = _read(state, self)
        if found != self.spec:
            raise other_format(self, f"learned for {found}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "step" in state_dict:  # a checkpoint of before says nothing of its format
            state_dict.setdefault(prefix + _KEY, self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.settle()

    def params(self, x: Tensor | None = None) -> Scale:
        scale = self.step.float().abs().clamp(min=MIN_SCALE)
        return scale, None if has_no_zero_point(self.spec) else self.zero_point


def _mean_of_blocks(x: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    total = block_reduce(x, block, "sum")
    return total / block_reduce(torch.ones_like(x), block, "sum").reshape(scale.shape)


# --------------------------------------------------------------------------------------------------------- checkpoints
_KEY = "_extra_state"  # torch's name for it


def format_in(state_dict: Mapping[str, Any], prefix: str, quantizer: FakeQuantizer) -> QSpec | None:
    """The format of the learned step that a checkpoint has under `prefix`; None if it does not say it.

    ConfigError if what it says cannot be read; it names the layer of `quantizer`.
    """
    state = state_dict.get(prefix + _KEY)
    return None if state is None else _read(state, quantizer)


def _read(state: Any, quantizer: FakeQuantizer) -> QSpec:
    try:
        return QSpec.from_json(json.loads(bytes(state.tolist())))
    except (AttributeError, IncError, RecursionError, TypeError, ValueError) as e:
        text = f"the checkpoint's format of the {quantizer.what}'s scale cannot be read ({e})"
        raise ConfigError(text, module=quantizer.path, hint="the checkpoint is damaged: load another one") from e


def other_format(quantizer: FakeQuantizer, found: str, more: int = 0) -> ConfigError:
    """What to raise where a checkpoint holds the scale of another format; `more`: of how many others, too."""
    kind = "learned for" if isinstance(quantizer, LearnedStep) else "found in training for"
    rest = f"; {more} other scale{'s are' if more > 1 else ' is'} of another format, too" if more else ""
    text = f"the {quantizer.what}'s scale in the checkpoint was {found}, and here it is {kind} {quantizer.spec}{rest}"
    hint = (
        "prepare the model as it was for that checkpoint; or leave the keys with `fake_quant` out of it, and load it "
    )
    hint += "with strict=False: the scales begin anew then"
    return ConfigError(text, module=quantizer.path, hint=hint)
