"""Own methods in `prepare`, `convert`, `quantize` and loading: configs whose name has an entry in `algos_mapping`.

An entry works on the modules of an eager model. It is told which module gets which config, with all that `set_local`,
white lists and compositions say; methods of the library in the same config are applied layer by layer to the modules
that they got. To save a converted model, write `algorithms_of(model)` as JSON, and its tensors; to load it, call
`rebuild(float_model, algorithms)` and put all of the tensors in their places.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from inc_graph.algorithms.entries import OFFERS_LOAD, algos_mapping
from inc_graph.common.mode import Mode
from inc_graph.errors import CaptureError, ConfigError, IncError, UnusedRuleWarning
from inc_graph.oppattern import Named, OperatorInfo, types_of_module
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.composable import ComposableConfig, as_config
from inc_graph.quantization.layers import keep_report, report_of
from inc_graph.quantization.mapping import Entry, ModuleType, entries_of, settled, type_of
from inc_graph.quantization.names import warn_prefixes
from inc_graph.quantization.where import asked
from inc_graph.recipe import Recipe
from inc_graph.report import Report, attribute_bytes

__all__ = [
    "Plan", "algorithms_of", "converted", "has_own_algorithm", "make_plan", "needs_data", "plan_of",
    "rebuild", "remember", "run_entries",
]  # fmt: skip

_PREPARED = "_inc_own_methods"
_CONVERTED = "_inc_algorithm"
_Pair = tuple[str, str]


@dataclass
class Plan:
    """What a model goes through.

    Attributes:
        mapping: (path, class name) -> config of every module that a config speaks of.
        entries: Own method -> its entry, in the order in which the model goes through them.
        rest: Config of the library's methods, for exactly their modules; None if there are none.
        example_inputs: For the entries.
        bytes_before: Of the parameters and buffers of the float model.
    """

    mapping: dict[_Pair, BaseConfig]
    entries: dict[str, Callable[..., Any]]
    rest: BaseConfig | None
    example_inputs: Any
    bytes_before: int


def _parts(config: BaseConfig) -> list[BaseConfig]:
    return config.config_list if isinstance(config, ComposableConfig) else [config]


def _inner(config: BaseConfig) -> list[BaseConfig]:
    return _parts(config) if isinstance(config, ComposableConfig) else list(config.local_config.values())


def has_own_algorithm(config: BaseConfig) -> bool:
    """Whether the config, a part of it or a local setting is of a method with an entry."""
    return config.name in algos_mapping or any(map(has_own_algorithm, _inner(config)))


def needs_data(config: BaseConfig) -> bool:
    """Whether the config cannot do without calibration data. Of an own method its class has to say so."""
    if any(map(needs_data, _inner(config))):
        return True
    if isinstance(config, ComposableConfig) or config.leaves_float() or not config.needs_calibration:
        return False
    said_by = next(c for c in type(config).__mro__ if "needs_calibration" in vars(c))
    return said_by is not BaseConfig or config.name not in algos_mapping


# ---------------------------------------------------------------------------------------------------------------- plan
def make_plan(model: Any, config: BaseConfig, example_inputs: Any = None) -> Plan:
    """Which module gets what. Neither the model nor the config is changed; entries get copies of the config.

    Raises:
        ConfigError: the model is a graph, is prepared or converted already, or has no module for the methods.
        CaptureError: it is no module.
        NotImplementedError: one of the methods is not in this version.
    """
    names = ", ".join(dict.fromkeys(_own_names(config)))
    if isinstance(model, fx.GraphModule) and "inc" in model.meta:
        raise ConfigError(
            f"{names} works on modules, and this is a graph", hint="give the model itself, not export(it)"
        )
    if not isinstance(model, nn.Module):
        hint = "give the model itself"
        raise CaptureError(f"{names} works on a torch.nn.Module, not on {type(model).__name__}", hint=hint)
    for mark, what in ((_PREPARED, "prepared"), (_CONVERTED, "converted")):
        if any(mark in vars(m) for m in model.modules()):
            raise ConfigError(f"the model is {what} already", hint="give the float model")
    config = copy.deepcopy(config)
    mapping = _mapping(_parts(config), model)
    entries = {n: f for n, f in algos_mapping.items() if any(c.name == n for c in mapping.values())}
    others = {key: c for key, c in mapping.items() if c.name not in entries and not c.leaves_float()}
    if not entries and not others:
        hint = "`operators` of its config class lists the classes it is for; see also white_list and set_local"
        raise ConfigError(f"the model has no module that is for {names}", hint=hint)
    rest = ComposableConfig(list(by_algorithm(others).values())) if others else None
    if rest is not None:
        rest.recipe("eager", None)  # what is not in this version says so before anything is done
    return Plan(mapping, entries, rest, example_inputs, attribute_bytes(model))


def _own_names(config: BaseConfig) -> list[str]:
    mine = [config.name] if config.name in algos_mapping else []
    return mine + [name for inner in _inner(config) for name in _own_names(inner)]


def _mapping(parts: Sequence[BaseConfig], model: nn.Module) -> dict[_Pair, BaseConfig]:
    """(path, class name) -> config, in the order of the model. A config speaks of the modules its method is for.

    A module with several names has one entry: under the first name that a setting gives, or else under its first one.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    speaking: dict[_Pair, list[BaseConfig]] = {}
    for part in parts:
        given = part.get_model_info(model)
        meant = {id(modules[path]) if path in modules else path for path, _ in given}
        pairs: list[_Pair] = [(path, type_of(path, m)) for path, m in modules.items() if id(m) in meant]
        pairs += [pair for pair in given if pair[0] not in modules]
        _report_keys(part, pairs)
        for pair in pairs:
            speaking.setdefault(pair, []).append(part)
    found: dict[Any, tuple[bool, _Pair, Entry]] = {}
    groups: dict[tuple[int, ...], list[_Pair]] = {}
    for pair, configs in speaking.items():
        groups.setdefault(tuple(map(id, configs)), []).append(pair)
    order = {path: i for i, path in enumerate(modules)}
    entries = [item for pairs in groups.values() for item in settled(speaking[pairs[0]], pairs).items()]
    for pair, entry in sorted(entries, key=lambda item: order.get(item[0][0], len(order))):
        module, by_name = modules.get(pair[0], pair), entry.where.kind == "name"
        if id(module) not in found or by_name > found[id(module)][0]:
            found[id(module)] = (by_name, pair, entry)
    return {pair: entry.config for _, pair, entry in found.values()}


def _report_keys(config: BaseConfig, pairs: Sequence[_Pair]) -> None:
    """Warn of settings that fit no module, or more than they seem to."""
    rules = config.rules()  # refuses lists of candidates, and local settings of methods that are not there
    for entry in entries_of([config]):
        if entry.key is not None and not any(_fits(entry, *pair) for pair in pairs):
            text = f"{entry.origin} matched no module that is for {config.name}"
            warnings.warn(text, UnusedRuleWarning, stacklevel=6)
    warn_prefixes(Recipe(config.name, rules, "", ""), [path for path, _ in pairs], stacklevel=7)


def _fits(entry: Entry, path: str, kind: str) -> bool:
    if entry.where.kind == "predicate":
        return asked(entry.key, kind.info if isinstance(kind, ModuleType) else OperatorInfo(path, kind, kind))
    types = kind.types if isinstance(kind, ModuleType) else types_of_module(kind)
    return entry.where.fit(Named(path, path, types, True)) is not None


def by_algorithm(mapping: Mapping[_Pair, BaseConfig]) -> dict[str, BaseConfig]:
    """Algorithm -> one config that gives exactly the modules of the mapping what they have there, by their names."""
    found: dict[str, BaseConfig] = {}
    for (path, _), config in mapping.items():
        key, plain = f"{re.escape(path)}$", config.global_config
        first = found.get(config.name)
        if first is None:
            plain.white_list = [key]
            found[config.name] = plain
            continue
        first.white_list = [*first.white_list, key]
        if plain.get_params_dict() != first.get_params_dict():
            plain.white_list = None
            first.set_local(key, plain)
    return found


# ------------------------------------------------------------------------------------------------------------ carry out
def run_entries(model: nn.Module, plan: Plan, mode: Mode, **arguments: Any) -> nn.Module:
    """Let a model go through the entries.

    Raises:
        IncError: an entry does not return a model.
        Whatever an entry raises: the model may be changed in part then.
    """
    for name, entry in plan.entries.items():
        model = _call(entry, name, model, plan, mode, arguments)
    return model


def _call(entry: Any, name: str, model: nn.Module, plan: Plan, mode: Mode, arguments: Mapping[str, Any]) -> nn.Module:
    in_eval = not any(m.training for m in model.modules())
    before = dict(model.named_modules(remove_duplicate=False))
    result = entry(model, dict(plan.mapping), mode=mode, example_inputs=plan.example_inputs, **arguments)
    if not isinstance(result, nn.Module):
        text = f"the entry of {name!r} gave {type(result).__name__} for {mode}, not a model"
        raise IncError(text, hint="return the model, also one that was changed in place")
    for path, old in before.items():  # the other names of a module that the entry has replaced
        names = [n for n, m in before.items() if m is old]
        first = next((n for n in names if (n, type(old).__name__) in plan.mapping), path)
        if path != first and first and _at(result, path) is old and (new := _at(result, first)) not in (old, None):
            result.set_submodule(path, new)
    for module in result.modules() if in_eval else ():
        module.training = False  # also what the entry has put in
    return result


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def remember(model: nn.Module, plan: Plan) -> nn.Module:
    """Note on a prepared model what `convert` needs."""
    model.__dict__[_PREPARED] = plan
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """What `remember` noted; None of a model that no own method has prepared."""
    return model.__dict__.get(_PREPARED)


def converted(model: nn.Module, plan: Plan) -> nn.Module:
    """Note on a converted model what it was made by, and give it a report."""
    report = report_of(model)  # of the library's methods
    if report is None:
        report = Report("", "code of one's own")
        keep_report(model, report)
    report.method = ", ".join([*plan.entries, *filter(None, [report.method])])
    report.bytes_before, report.bytes_after = plan.bytes_before, attribute_bytes(model)
    for own in plan.entries:
        modules = ", ".join(path or "the model" for (path, _), c in plan.mapping.items() if c.name == own)
        report.notes.append(f"{own}: {modules}")
    return _mark(model, plan)


def _mark(model: nn.Module, plan: Plan) -> nn.Module:
    model.__dict__.pop(_PREPARED, None)
    model.__dict__[_CONVERTED] = {"algorithms": by_algorithm(plan.mapping)}
    return model


# ------------------------------------------------------------------------------------------------------- save and load
def algorithms_of(model: nn.Module) -> dict[str, BaseConfig] | None:
    """Algorithm -> config of a model that own methods have converted, None of another one.

    Modules are named in full in these configs: predicates and classes are resolved, so that each has a form in JSON
    (`to_dict`) and means the same modules of the float model. Methods of the library are among them where they were in
    the same config.
    """
    facts = model.__dict__.get(_CONVERTED)
    return None if facts is None else dict(facts["algorithms"])


def rebuild(model: nn.Module, configs: Mapping[str, Any] | BaseConfig) -> nn.Module:
    """The model that a saved one's `state_dict` is to be loaded into, strictly. Its own values mean nothing yet.

    Modules that methods of the library got in the same config stay as they are: to put their graphs there, and a
    report, is the caller's part. Entries that offer it (`register_algo(name, load=True)`) are called with `Mode.LOAD`;
    the others with `Mode.PREPARE` and `Mode.CONVERT`, without calibration data.

    Args:
        model: The float model; it is changed.
        configs: From `algorithms_of`: algorithm -> config, or its dictionary.

    Raises:
        UnknownNameError, NotImplementedError: an own method of the saved model has no config class, or no entry, here.
        ConfigError: the model has no module for it.
        Whatever an entry raises.
    """
    config = _read(configs)
    for part in _parts(config):
        if part.name not in algos_mapping and not type(part).__module__.startswith("inc_graph."):
            part.recipe("eager", None)  # raises: it has no entry
    plan = make_plan(model, config)
    for name, entry in plan.entries.items():
        for mode in (Mode.LOAD,) if name in OFFERS_LOAD else (Mode.PREPARE, Mode.CONVERT):
            model = _call(entry, name, model, plan, mode, {})
    return _mark(model, plan)


def _read(configs: Any) -> BaseConfig:
    if isinstance(configs, Mapping) and all(isinstance(c, BaseConfig) for c in configs.values()):
        return ComposableConfig(list(configs.values()))
    return as_config(configs)
