"""Static INT8: weights and activations in 8 bits, with ranges known before the model runs."""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from inc_graph.calibrate import RangeEstimator
from inc_graph.errors import IncError, UnknownNameError
from inc_graph.options import make_estimator
from inc_graph.qtypes import QType, get_qtype
from inc_graph.quantization.base_config import BaseConfig, register_config
from inc_graph.quantization.fields import Field, a_bool, a_choice, a_list, anything, normal
from inc_graph.recipe import OpQuant, Recipe
from inc_graph.registry import ALGORITHMS, CONFIGS, QTYPES
from inc_graph.spec import PerChannel, PerTensor, QSpec

__all__ = [
    "EXCLUDED", "INT8", "SEVEN_BITS", "INT8StaticQuantConfig", "Int8Config", "StaticQuantConfig", "needs_reduce_range",
    "static_int8",
]  # fmt: skip

SEVEN_BITS = {"int8": "int7", "uint8": "uint7"}


def _a_qtype(*kinds: str) -> Callable[[Any], str | None]:
    """Check for the name of a registered qtype of one of `kinds` and at most 8 bits, or "fp32"."""

    def fits(qtype: QType) -> bool:
        return qtype.kind in kinds and qtype.bits <= 8 and qtype.scale_format == "float32"

    def check(value: Any) -> str | None:
        if value == "fp32" or (isinstance(value, str) and value in QTYPES and fits(get_qtype(value))):
            return None
        known = [name for name, qtype in QTYPES.items() if fits(qtype)]
        return f"one of {', '.join(map(repr, [*known, 'fp32']))}"

    return check


def _an_estimator(of_batches: bool) -> Callable[[Any], str | None]:
    """Check for a range estimator; with `of_batches`, one that takes in more than one tensor."""

    def fits(kind: Any) -> bool:
        return isinstance(kind, type) and issubclass(kind, RangeEstimator) and kind.batches >= of_batches

    def check(value: Any) -> str | None:
        known = ", ".join(repr(name) for name, kind in ALGORITHMS.items() if fits(kind))
        legal = f"a range estimator{' of several batches' if of_batches else ''} (one of {known})"
        try:
            return None if fits(type(make_estimator(value))) else legal
        except UnknownNameError:
            return legal
        except IncError as e:
            return f"{legal}; {e.message}"

    return check


INT8: dict[str, Field] = {
    "w_dtype": Field("int8", _a_qtype("int", "codebook"), 'Weight format; "fp32" leaves the operator float.'),
    "w_sym": Field(True, a_bool, "Weights symmetric around zero."),
    "w_granularity": Field("per_channel", a_choice("per_channel", "per_tensor"), "Weights that share a scale."),
    "w_algo": Field("minmax", _an_estimator(False), 'Range estimator of weights, such as "mse".'),
    "act_dtype": Field("uint8", _a_qtype("int"), 'Activation format; "fp32" quantizes weights only.'),
    "act_sym": Field(False, a_bool, "Activations symmetric around zero."),
    "act_granularity": Field("per_tensor", a_choice("per_tensor"), "Activations that share a scale."),
    "act_algo": Field("minmax", _an_estimator(True), 'Range estimator of activations, such as "kl".'),
}
EXCLUDED = Field(
    [], a_list(a_choice("bf16", "fp16"), "precisions: 'bf16', 'fp16'"), "Precisions that the rest must not use."
)


class Int8Config(BaseConfig):
    """What the INT8 methods share: the operators that they are for, and when they leave them float."""

    operators: ClassVar[tuple[Any, ...]] = (
        torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose1d,
        torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d, torch.nn.Embedding, "Conv1D",
    )  # fmt: skip

    def leaves_float(self) -> bool:
        return getattr(self, "w_dtype", None) == "fp32"


def _class_names(value: Any) -> Any:
    """`normal`, with the name of a class in its place."""
    if isinstance(value, list | tuple):
        return [_class_names(v) for v in value]
    return value.__name__ if isinstance(value, type) else normal(value)


class StaticQuantConfig(BaseConfig):
    """A static quantization config: an `FP8Config` if `fp8_config` is given, else an `INT8StaticQuantConfig`.

    Called on this class, what configs offer without an object (`from_dict`, `get_config_set_for_tuning`) is for these
    two as well; where only one can be meant, it is the INT8 one.
    """

    fields: ClassVar[dict[str, Field]] = {
        **INT8,
        "excluded_precisions": EXCLUDED,
        "white_list": Field("*"),
        "model_info": Field(None, anything, "Not used.", convert=_class_names),
        "bias_correction": Field(True, a_bool, "Correct biases for the mean error of the weights.", ours=True),
        "reduce_range": Field(None, a_choice(None, False, True), "7-bit formats, for CPUs without VNNI.", ours=True),
    }
    operators: ClassVar[tuple[Any, ...]] = Int8Config.operators
    tuning: ClassVar[dict[str, list[Any]]] = {"act_sym": [True, False], "act_algo": ["kl", "minmax"]}

    def __new__(cls, *args: Any, **values: Any) -> Any:
        if cls is StaticQuantConfig:
            cls = CONFIGS.get("static_quant" if values.get("fp8_config") is None else "fp8_quant")
        return object.__new__(cls)  # `__init__` of that class comes next

    @classmethod
    def from_json_file(cls, filename: str | os.PathLike[str]) -> Any:
        found = super().from_json_file(filename)
        return found if type(found) is cls else type(found).from_json_file(filename)


StaticQuantConfig.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
     inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
)  # fmt: skip


@register_config(algo_name="static_quant")
class INT8StaticQuantConfig(StaticQuantConfig, Int8Config):
    """Static quantization: activation ranges are found once, on calibration data.

    Fields:
        w_dtype: Weight type: any integer or codebook qtype, such as "int8", "int7", "int4"; "fp32" leaves the operator
            float.
        w_sym: Weights symmetric around zero.
        w_granularity: "per_channel" (one scale an output channel) or "per_tensor".
        w_algo: Range estimator of weights: "minmax", "mse", "percentile{percent=99.99}", ...
        act_dtype: Activation type: any integer qtype, such as "uint8", "int8", "uint7"; "fp32" quantizes weights only.
        act_sym: Activations symmetric around zero.
        act_granularity: "per_tensor".
        act_algo: Range estimator of activations: "minmax", "moving_average", "percentile", "histogram_mse", "kl".
        excluded_precisions: Precisions that the rest of the model must not use: a composition with a
            `MixedPrecisionConfig` that asks for one is refused. Alone, static INT8 uses float32 for the rest.
        model_info: Accepted for compatibility and not used: the graph says what is in the model.
        bias_correction: Correct each bias for the mean error of its quantized weight (Nagel et al. 2019).
        reduce_range: 7-bit activations and weights, which cannot saturate 16-bit accumulators of CPUs without VNNI;
            None: where the machine needs it.
    """

    w_dtype: str
    w_sym: bool
    w_granularity: str
    w_algo: str
    act_dtype: str
    act_sym: bool
    act_granularity: str
    act_algo: str
    excluded_precisions: list[str]
    model_info: Any
    bias_correction: bool
    reduce_range: bool | None

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Not where weights alone are quantized, without a correction that looks at the inputs."""
        alone = self.leaves_float() or (self.act_dtype == "fp32" and not self.bias_correction)
        return not alone or any(c.needs_calibration for c in self._local.values())

    def op_quant(self) -> OpQuant | None:
        return None if self.w_dtype == "fp32" else static_int8(self, self.bias_correction, self.reduce_range)

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        return Recipe(
            self.name,
            self.rules(),
            prepare="fold-constants,canonicalize,fold-conv-bn,annotate,insert-observers",
            convert="correct-bias,convert-qdq",
            supported=supported,
            backend=backend,
        )


def static_int8(config: Any, bias_correction: bool, reduce_range: bool | None = None) -> OpQuant:
    """What the fields of `INT8` mean for one operator, with ranges known before the model runs."""
    reduce = needs_reduce_range() if reduce_range is None else reduce_range
    w_type = SEVEN_BITS.get(config.w_dtype, config.w_dtype) if reduce else config.w_dtype
    granularity = PerChannel(0) if config.w_granularity == "per_channel" else PerTensor()
    weight = QSpec(w_type, "symmetric" if config.w_sym else "asymmetric", granularity)
    activation = None
    if config.act_dtype != "fp32":
        a_type = SEVEN_BITS.get(config.act_dtype, config.act_dtype) if reduce else config.act_dtype
        activation = QSpec(a_type, "symmetric" if config.act_sym else "asymmetric", PerTensor())
    return OpQuant(activation, weight, config.act_algo, config.w_algo, bias_correction)


def needs_reduce_range() -> bool:
    """u8 x s8 products are summed pairwise in 16 bits, with saturation, on x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    supported = getattr(torch.cpu, "_is_vnni_supported", None) or getattr(
        torch._C._cpu, "_is_avx512_vnni_supported", None
    )
    return supported is not None and not supported()
