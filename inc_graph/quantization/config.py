"""User configs: what to quantize, said in the terms of the field. A config compiles to a recipe.

One table of fields drives construction, validation, `to_dict`, `==` and `repr`; a config class is that table plus
`recipe`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch

from inc_graph.calibrate import RangeEstimator
from inc_graph.errors import ConfigError, IncError, UnknownNameError
from inc_graph.options import make_estimator
from inc_graph.qtypes import QType, get_qtype
from inc_graph.recipe import OpQuant, Recipe, Where, WhereRule, names_of_type
from inc_graph.registry import ALGORITHMS, QTYPES
from inc_graph.spec import PerChannel, PerTensor, QSpec

__all__ = ["BaseConfig", "Field", "INT8StaticQuantConfig", "StaticQuantConfig", "get_default_static_config"]


@dataclass(frozen=True)
class Field:
    """One field of a config: its default, and a check that gives the legal values if the given one is not."""

    default: Any
    check: Callable[[Any], str | None] = lambda value: None
    tunable: bool = True


def one_of(*values: Any) -> Callable[[Any], str | None]:
    """Check that a value is in a list."""
    return lambda value: None if value in values else f"one of {', '.join(map(repr, values))}"


def a_bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def an_estimator(of_batches: bool) -> Callable[[Any], str | None]:
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


class BaseConfig:
    """Base of the configs. Subclasses set `name` and `fields`.

    Args:
        white_list: "*" for every operator, or a list of module names (regex), classes and functions to quantize.
        **values: The fields of the class.

    Raises:
        ConfigError: on an unknown field (with the nearest name) or an illegal value (with the legal ones).
    """

    name: ClassVar[str] = ""
    fields: ClassVar[dict[str, Field]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        params = [inspect.Parameter(n, kind, default=f.default) for n, f in cls.fields.items()]
        params.append(inspect.Parameter("white_list", kind, default="*"))
        cls.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **values: Any) -> None:
        given = dict(zip([*self.fields, "white_list"], args, strict=False))
        if len(args) > len(self.fields) + 1:
            raise ConfigError(f"{type(self).__name__} takes at most {len(self.fields) + 1} arguments, got {len(args)}")
        if twice := sorted(set(given) & set(values)):
            raise ConfigError(f"{type(self).__name__}: {', '.join(twice)} given twice")
        values = {**given, **values}
        white_list = values.pop("white_list", "*")
        for key in values:
            if key not in self.fields:
                self._unknown(key)
        for key, spec in self.fields.items():
            setattr(self, key, copy.copy(values.get(key, spec.default)))
        self.white_list = white_list
        self._local: dict[Any, BaseConfig] = {}

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.fields:
            if (expected := self.fields[key].check(value)) is not None:
                near = difflib.get_close_matches(str(value), re.findall(r"'(\w+)'", expected), 1)
                message = f"{type(self).__name__}.{key} must be {expected}, not {value!r}"
                raise ConfigError(message, hint=f"did you mean {near[0]!r}?" if near else None)
        elif key == "white_list":
            value = _white_list(value)
        elif not key.startswith("_"):
            self._unknown(key)
        super().__setattr__(key, value)

    def _unknown(self, key: str) -> NoReturn:
        near = difflib.get_close_matches(key, self.fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"fields: {', '.join(self.fields)}"
        raise ConfigError(f"{type(self).__name__} has no field {key!r}", hint=hint)

    # -------------------------------------------------------------------------------------------------- local settings
    def set_local(self, operator_name_or_list: Any, config: BaseConfig) -> BaseConfig:
        """Another config for some operators; `StaticQuantConfig(w_dtype="fp32")` leaves them float.

        Args:
            operator_name_or_list: A module name (regex, matched at the start: `fc1` is also `fc10`, `fc1$` is not), a
                module class, a function such as `torch.matmul`, or a list of them.
            config: It is not copied; what it says when `prepare` is called counts.

        A name is more specific than a type, a type more than the config itself; among equals the one said last wins.

        Raises:
            ConfigError: if `config` is not a config, or a name or type is neither.
        """
        if not isinstance(config, BaseConfig):
            raise ConfigError(f"set_local needs a config, not {config!r}", hint=f"for example {type(self).__name__}()")
        items = (
            operator_name_or_list if isinstance(operator_name_or_list, list | tuple | set) else [operator_name_or_list]
        )
        for item in items:
            _where(item)
        for item in items:
            self._local.pop(item, None)  # the last said goes to the end
            self._local[item] = config
        return self

    @property
    def local_config(self) -> dict[Any, BaseConfig]:
        """Name or type -> config, in the order said."""
        return dict(self._local)

    @property
    def global_config(self) -> BaseConfig:
        """The same config without local settings."""
        return type(self)(**self.get_params_dict(), white_list=self.white_list)

    # -------------------------------------------------------------------------------------------------------- as values
    def get_params_dict(self) -> dict[str, Any]:
        """Field -> value."""
        return {key: getattr(self, key) for key in self.fields}

    def to_dict(self) -> dict[str, Any]:
        """Field -> value; with local settings {"global": ..., "local": {name: ...}}."""
        if not self._local:
            return self.get_params_dict()
        local = {k if isinstance(k, str) else names_of_type(k)[1]: c.to_dict() for k, c in self._local.items()}
        return {"global": self.get_params_dict(), "local": local}

    def __eq__(self, other: object) -> bool:
        return (
            type(self) is type(other)
            and isinstance(other, BaseConfig)
            and self.get_params_dict() == other.get_params_dict()
            and (self.white_list, self._local) == (other.white_list, other._local)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        changed = [f"{k}={v!r}" for k, v in self.get_params_dict().items() if v != self.fields[k].default]
        local = f" with {len(self._local)} local settings" if self._local else ""
        return f"{type(self).__name__}({', '.join(changed)}){local}"

    # ------------------------------------------------------------------------------------------------------ as a recipe
    def op_quant(self) -> OpQuant | None:
        """What these fields mean for one operator; None: float."""
        raise NotImplementedError(f"{type(self).__name__} has no algorithm yet")

    def rules(self) -> tuple[WhereRule, ...]:
        """Rules of this config and its local settings, from the general to the specific."""
        everywhere = self.op_quant() if self.white_list == "*" else None
        origin = "white_list" if self.white_list != "*" else ""
        found = [WhereRule(Where(), everywhere, origin)]
        if self.white_list != "*":
            found += [WhereRule(_where(w), self.op_quant(), f"white_list entry {_shown(w)}") for w in self.white_list]
        return (
            *found,
            *(WhereRule(_where(k), c.op_quant(), f"set_local({_shown(k)})") for k, c in self._local.items()),
        )

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        """The recipe for a backend that has kernels for the operator types `supported` (None: all)."""
        raise NotImplementedError(f"{type(self).__name__} has no algorithm yet")


def _white_list(value: Any) -> Any:
    if value == "*" or value is None:
        return "*"
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"white_list must be '*' or a list of names and types, not {value!r}")
    value = list(value)
    for item in value:
        _where(item)
    return value


def _where(item: Any) -> Where:
    if isinstance(item, str):
        return Where("name", item)
    if isinstance(item, type) and issubclass(item, torch.nn.Module):
        return Where("type", names_of_type(item)[1])
    if callable(item):
        return Where("type", names_of_type(item)[1] if not isinstance(item, torch._ops.OpOverload) else str(item))
    raise ConfigError(f"expected a module name, a module class or a function, not {item!r}")


def _shown(item: Any) -> str:
    return repr(item) if isinstance(item, str) else names_of_type(item)[0]


# ------------------------------------------------------------------------------------------------------- static INT8
_SEVEN_BITS = {"int8": "int7", "uint8": "uint7"}


def _a_qtype(*kinds: str) -> Callable[[Any], str | None]:
    """Check for the name of a registered qtype of one of `kinds` and at most 8 bits, or "fp32"."""

    def check(value: Any) -> str | None:
        if value == "fp32":
            return None
        if isinstance(value, str) and value in QTYPES and _fits(get_qtype(value)):
            return None
        known = [name for name, qtype in QTYPES.items() if _fits(qtype)]
        return f"one of {', '.join(map(repr, [*known, 'fp32']))}"

    def _fits(qtype: QType) -> bool:
        return qtype.kind in kinds and qtype.bits <= 8 and qtype.scale_format == "float32"

    return check


class INT8StaticQuantConfig(BaseConfig):
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
        excluded_precisions: Precisions that the rest of the model must not use; float32 is all that static INT8 uses.
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

    name = "static_quant"
    fields: ClassVar[dict[str, Field]] = {
        "w_dtype": Field("int8", _a_qtype("int", "codebook")),
        "w_sym": Field(True, a_bool),
        "w_granularity": Field("per_channel", one_of("per_channel", "per_tensor")),
        "w_algo": Field("minmax", an_estimator(of_batches=False)),
        "act_dtype": Field("uint8", _a_qtype("int")),
        "act_sym": Field(False, a_bool),
        "act_granularity": Field("per_tensor", one_of("per_tensor")),
        "act_algo": Field("minmax", an_estimator(of_batches=True)),
        "excluded_precisions": Field(
            [], lambda v: None if isinstance(v, list) else "a list of precisions", tunable=False
        ),
        "model_info": Field(None, tunable=False),
        "bias_correction": Field(True, a_bool),
        "reduce_range": Field(None, one_of(None, True, False)),
    }

    def op_quant(self) -> OpQuant | None:
        if self.w_dtype == "fp32":
            return None
        reduce = _needs_reduce_range() if self.reduce_range is None else self.reduce_range
        w_type = _SEVEN_BITS.get(self.w_dtype, self.w_dtype) if reduce else self.w_dtype
        granularity = PerChannel(0) if self.w_granularity == "per_channel" else PerTensor()
        weight = QSpec(w_type, "symmetric" if self.w_sym else "asymmetric", granularity)
        activation = None
        if self.act_dtype != "fp32":
            a_type = _SEVEN_BITS.get(self.act_dtype, self.act_dtype) if reduce else self.act_dtype
            activation = QSpec(a_type, "symmetric" if self.act_sym else "asymmetric", PerTensor())
        return OpQuant(activation, weight, self.act_algo, self.w_algo, self.bias_correction)

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        return Recipe(
            self.name,
            self.rules(),
            prepare="fold-constants,canonicalize,fold-conv-bn,annotate,insert-observers",
            convert="correct-bias,convert-qdq",
            supported=supported,
            backend=backend,
        )


def _needs_reduce_range() -> bool:
    """u8 x s8 products are summed pairwise in 16 bits, with saturation, on x86 without VNNI."""
    import platform

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    supported = getattr(torch.cpu, "_is_vnni_supported", None) or getattr(
        torch._C._cpu, "_is_avx512_vnni_supported", None
    )
    return supported is not None and not supported()


def StaticQuantConfig(*args: Any, **kwargs: Any) -> INT8StaticQuantConfig:
    """A static quantization config: `INT8StaticQuantConfig(*args, **kwargs)`.

    Raises:
        ConfigError: as `INT8StaticQuantConfig`; and for `fp8_config=`, which names a method this version does not have.
    """
    if "fp8_config" in kwargs:
        raise ConfigError("StaticQuantConfig(fp8_config=...): the FP8 method is not in this version")
    return INT8StaticQuantConfig(*args, **kwargs)


def get_default_static_config() -> INT8StaticQuantConfig:
    """The default static INT8 config."""
    return INT8StaticQuantConfig()
