"""What configs come to: the entries of each, from which its rules are made, and which config each module gets.

The precedence is `inc_graph.recipe.decide`'s; here a module takes the place of an operator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from inc_graph.oppattern import Named, OperatorInfo, pattern_of_module, types_of_module
from inc_graph.quantization.fields import DEFAULT_WHITE_LIST
from inc_graph.quantization.where import asked, shown, where_of
from inc_graph.recipe import ENTRY, PRIORITY, WHITE_LIST, Where, decide

__all__ = ["Entry", "ModuleType", "config_mapping", "entries_of", "info_of", "settled", "type_of"]


@dataclass(frozen=True)
class Entry:
    """One rule to be: whom it speaks of, and the config that they get (None: they stay float).

    `key` is the key of a setting as the user gave it, None of what is no setting.
    """

    where: Where
    config: Any
    origin: str = ""
    key: Any = None

    @property
    def floats(self) -> bool:
        """Whether operators stay float."""
        return self.config is None or self.config.leaves_float()

    @property
    def half(self) -> Any:
        """The half precision that operators get, None if they are quantized or stay float."""
        return None if self.floats else self.config.half


def entries_of(configs: Sequence[Any]) -> list[Entry]:
    """The entries of configs, in rising priority; among equals the order is kept."""
    ranked = sorted(configs, key=lambda c: c.rank)
    found: list[Entry] = []
    for i, config in enumerate(ranked):
        if i and ranked[i - 1].rank < config.rank:
            found.append(Entry(Where(), None, PRIORITY))
        found += _entries(config)
    return found


def _entries(config: Any) -> list[Entry]:
    plain = config.global_config
    everything = config.white_list == DEFAULT_WHITE_LIST
    found = [Entry(Where("all", config.scope), plain) if everything else Entry(Where(), None, WHITE_LIST)]
    found += [Entry(Where("implied", name), inner, f"{config.name} by default") for name, inner in config.implied()]
    if not everything:
        found += [Entry(where_of(key), plain, ENTRY + shown(key), key) for key in config.white_list]
    return found + [Entry(where_of(k), c, f"set_local({shown(k)})", k) for k, c in config.local_config.items()]


class ModuleType(str):
    """The class name of a module, as `get_model_info` gives it, which also knows what its module is."""

    info: OperatorInfo
    types: frozenset[str]


def type_of(path: str, module: nn.Module) -> ModuleType:
    """The class name of the module at `path`."""
    found = ModuleType(type(module).__name__)
    found.info, found.types = info_of(path, module), types_of_module(type(module))
    return found


def info_of(path: str, module: nn.Module) -> OperatorInfo:
    """What predicates are asked about."""
    weight = module._parameters.get("weight")
    pattern, kind = pattern_of_module(type(module)), type(module).__name__
    return OperatorInfo(path, pattern.name if pattern else kind, kind, None if weight is None else tuple(weight.shape))


def settled(
    configs: Sequence[Any], model_info: Sequence[tuple[str, str]], infos: Mapping[str, OperatorInfo] | None = None
) -> OrderedDict[tuple[str, str], Entry]:
    """(path, class name) -> the entry that counts, for each module that a config speaks of. See `config_mapping`."""
    known = {path: (infos or {}).get(path) or _known(path, kind) for path, kind in model_info}
    entries = [
        replace(e, where=replace(e.where, members=tuple(path for path, info in known.items() if asked(e.key, info))))
        if e.where.kind == "predicate"
        else e
        for e in entries_of(configs)
    ]
    found: OrderedDict[tuple[str, str], Entry] = OrderedDict()
    for path, kind in model_info:
        types = kind.types if isinstance(kind, ModuleType) else types_of_module(kind)
        index = decide(entries, Named(path, path, types, True))
        if index is not None and entries[index].config is not None:
            found[path, kind] = entries[index]
    return found


def _known(path: str, kind: str) -> OperatorInfo:
    return kind.info if isinstance(kind, ModuleType) else OperatorInfo(path, kind, kind)


def config_mapping(
    configs: Sequence[Any], model_info: Sequence[tuple[str, str]], infos: Mapping[str, OperatorInfo] | None = None
) -> OrderedDict[tuple[str, str], Any]:
    """(path, class name) -> config, for each module that a config speaks of.

    Args:
        configs: See `inc_graph.recipe.decide` for which of them wins.
        model_info: (path, class name) of each module. Of pairs from `get_model_info` the module is known besides: base
            classes, functions and predicates mean what they mean when the model is prepared.
        infos: Path -> what predicates are asked about, if not that.
    """
    return OrderedDict((pair, entry.config) for pair, entry in settled(configs, model_info, infos).items())
