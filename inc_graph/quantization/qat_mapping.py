"""What `prepare_qat` is told to train: names of formats by layer, or a config; both become a recipe.

None                              {torch.nn.Linear: "MXFP8"}
{nn.Linear: "MXFP4", "head": None}    keys as `set_local` has them; None and "fp32" leave float
{nn.Linear: StaticQuantConfig()}  a config for what the key speaks of
StaticQuantConfig(...)            with its own local settings
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from inc_graph.errors import ConfigError
from inc_graph.passmanager import Pipeline
from inc_graph.qtypes import get_qtype
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.configs.activations import INT8StaticQuantConfig
from inc_graph.quantization.where import is_predicate, shown, where_of
from inc_graph.recipe import OpQuant, Recipe, Where, WhereRule
from inc_graph.registry import QTYPES
from inc_graph.spec import PerChannel, PerGroup, PerTensor, QSpec

__all__ = ["DEFAULT_MAPPING", "format_of", "recipe_for"]

DEFAULT_MAPPING = {nn.Linear: "MXFP8"}
_FLOAT = ("fp32", "float32")
_PREPARE = "fold-constants,canonicalize,fold-conv-bn,annotate,insert-observers"


def recipe_for(mapping: Any, backend: str, supported: tuple[str, ...] | None) -> tuple[Recipe, dict[int, Any]]:
    """(recipe, {index of a rule: predicate}) of what the user gave.

    Raises:
        ConfigError: an unknown format, a key that speaks of nothing, a method that cannot be trained; names the key.
    """
    if isinstance(mapping, BaseConfig):
        recipe, predicates = mapping.recipe(backend, supported), mapping.predicates()
        rules = [replace(rule, what=_trainable(rule.what)) for rule in recipe.rules]
        _refuse_half(rules)
        return replace(recipe, rules=tuple(rules), convert=_without_correction(recipe.convert)), predicates
    if mapping is None:
        mapping = DEFAULT_MAPPING
    if not isinstance(mapping, Mapping):
        hint = 'for example {torch.nn.Linear: "MXFP8"}, or StaticQuantConfig()'
        raise ConfigError(f"mapping must be a dictionary or a config, not {mapping!r}", hint=hint)
    if not mapping:
        raise ConfigError("the mapping is empty: nothing would be trained for", hint="None means Linear to MXFP8")
    rules, predicates = [WhereRule(Where("all"), None, "mapping")], {}
    for key, value in mapping.items():
        if is_predicate(key):
            predicates[len(rules)] = key
        rules.append(WhereRule(where_of(key), _what(key, value), f"mapping[{shown(key)}]"))
    _refuse_half(rules)
    return Recipe("qat", tuple(rules), _PREPARE, "convert-qdq", supported, backend), predicates


def _what(key: Any, value: Any) -> OpQuant | None:
    if value is None or (isinstance(value, str) and value.lower() in _FLOAT):
        return None
    if isinstance(value, BaseConfig):
        if value._local:
            hint = "put its local settings into the mapping, or give the config alone"
            raise ConfigError(f"the config at mapping[{shown(key)}] has local settings of its own", hint=hint)
        return _trainable(value.op_quant())
    if isinstance(value, str):
        try:
            return format_of(value)
        except ConfigError as e:
            raise ConfigError(f"mapping[{shown(key)}]: {e.message}", hint=e.hint) from e
    raise ConfigError(f"mapping[{shown(key)}] must be the name of a format or a config, not {value!r}")


def format_of(name: str) -> OpQuant:
    """Weights and activations in one format, by its name in any case.

    Formats with blocks of their own (MX): scales from the tensor itself, in blocks along the inputs, for both. Integers
    of n bits: signed weights, one scale an output channel; unsigned activations, one range found in training (as
    `StaticQuantConfig` has it). Float8: the same, symmetric.

    Raises:
        ConfigError: there is no such format, or it says too little by itself.
    """
    known = {n.lower(): n for n in QTYPES.names()}
    if name.lower() not in known:
        usable = ", ".join(n.upper() for n in known if _usable(n))
        raise ConfigError(f"no format {name!r} to train for", hint=f"one of {usable}; or a config")
    qtype = get_qtype(known[name.lower()])
    if not _usable(qtype.name):
        hint = f"give a config that says which weights share a scale, such as RTNConfig(dtype={qtype.name!r})"
        raise ConfigError(f"the format {name!r} alone does not say how to train for it", hint=hint)
    if qtype.block is not None:
        block = PerGroup(qtype.block, -1)
        return OpQuant(QSpec(qtype.name, granularity=block, dynamic=True), QSpec(qtype.name, granularity=block))
    if qtype.is_int:
        fields: dict[str, Any] = {"w_dtype": qtype.name, "act_dtype": f"u{qtype.name}", "bias_correction": False}
        found = INT8StaticQuantConfig(**fields).op_quant()
        assert found is not None
        return found
    return OpQuant(QSpec(qtype.name, granularity=PerTensor()), QSpec(qtype.name, granularity=PerChannel(0)))


def _usable(name: str) -> bool:
    qtype = get_qtype(name)
    return qtype.bits <= 8 and (qtype.block is not None or qtype.kind == "float" or (qtype.is_int and qtype.signed))


def _trainable(what: OpQuant | None) -> OpQuant | None:
    """Training finds biases itself.

    Raises:
        ConfigError: activations were to be smoothed, which calibration data does.
    """
    if what is not None and what.smooth:
        hint = "train with StaticQuantConfig; or quantize the trained float model with SmoothQuantConfig"
        raise ConfigError("SmoothQuant goes by calibration data, which training does not collect", hint=hint)
    return None if what is None else replace(what, bias_correction=False)


def _refuse_half(rules: Sequence[WhereRule]) -> None:
    """Beside formats that are trained for, half precision is what `convert` gives the rest.

    Raises:
        ConfigError: there is nothing but half precision.
    """
    asked = [r.what for r in rules if r.what is not None]
    halves = sorted({what.half for what in asked if what.half is not None})
    if halves and not any(what.weight or what.activation for what in asked):
        hint = "train under torch.autocast, and convert the trained model with MixedPrecisionConfig"
        raise ConfigError(f"nothing is trained for in {' and '.join(halves)} alone", hint=hint)


def _without_correction(text: str) -> str:
    return str(Pipeline(p for p in Pipeline.parse(text).passes if p.name != "correct-bias"))
