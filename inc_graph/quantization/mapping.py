"""Which config each module of a model gets: the rule of precedence on its own, without a graph.

    rank of a setting for a module:   4 name, the whole path    3 name, the start of the path    2 predicate
                                      1 class or function       0 the config itself

The highest rank wins, among equals the one said last. Settings that a config implies (a float head) lie between 1 and
2. Between the configs of a composition the one with the higher priority wins where both claim a module.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from inc_graph.errors import ConfigError
from inc_graph.oppattern import OperatorInfo
from inc_graph.quantization.fields import DEFAULT_WHITE_LIST
from inc_graph.quantization.where import is_predicate
from inc_graph.recipe import names_of_type

__all__ = ["config_for", "config_mapping", "rank_of", "winner"]


def rank_of(key: Any, path: str, kind: str, info: OperatorInfo | None = None) -> float | None:
    """How specific a key is for the module at `path` whose class is called `kind`; None if it does not speak of it.

    `info` is what a predicate is asked about; by default path and class are all that is known.
    """
    if isinstance(key, str):
        if re.fullmatch(key, path):
            return 4
        if re.match(key, path):
            return 3
        return 1 if key == kind else None  # neural_compressor takes the name of a class for the class
    if isinstance(key, type) or getattr(key, "__module__", "") is None:
        return 1 if kind in names_of_type(key) else None
    if is_predicate(key):
        return 2 if _ask(key, info or OperatorInfo(path, kind, kind)) else None
    return 1 if kind in names_of_type(key) else None


def _ask(predicate: Any, info: OperatorInfo) -> bool:
    try:
        return bool(predicate(info))
    except Exception as e:
        name = getattr(predicate, "__name__", repr(predicate))
        hint = "a predicate takes one OperatorInfo: name, op, module_type, weight_shape"
        raise ConfigError(f"predicate {name} fails for {info}: {type(e).__name__}: {e}", hint=hint) from e


def config_for(config: Any, path: str, kind: str, info: OperatorInfo | None = None) -> Any:
    """The config that the module at `path` gets; None if none speaks of it (it is outside of the white list)."""
    everything = config.white_list == DEFAULT_WHITE_LIST
    found: list[tuple[float, int, Any]] = []
    settings: list[tuple[Any, Any]] = [] if everything else [(key, config.global_config) for key in config.white_list]
    settings += list(config.local_config.items())
    for i, (key, inner) in enumerate(settings):
        if (rank := rank_of(key, path, kind, info)) is not None:
            found.append((rank, i, inner))
    found += [(1.5, i, inner) for i, (name, inner) in enumerate(config.implied()) if re.match(name, path)]
    if everything:
        found.append((0, -1, config.global_config))
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def config_mapping(
    configs: Sequence[Any],
    model_info: Sequence[tuple[str, str]],
    infos: Mapping[str, OperatorInfo] | None = None,
) -> OrderedDict[tuple[str, str], Any]:
    """(path, class name) -> config, for each module that a config speaks of.

    Args:
        configs: Later ones win, unless a lower priority or a float setting stands against an earlier one.
        model_info: (path, class name) of each module.
        infos: Path -> what predicates are asked about.
    """
    mapping: OrderedDict[tuple[str, str], Any] = OrderedDict()
    for path, kind in model_info:
        info = (infos or {}).get(path)
        claims = [(c, found) for c in configs if (found := config_for(c, path, kind, info)) is not None]
        if claims:
            mapping[path, kind] = winner(claims)
    return mapping


def winner(claims: Sequence[tuple[Any, Any]]) -> Any:
    """Of the pairs (config, what it says of a module) what counts: what quantizes, then priority, then the later."""
    quantizing = [(c, found) for c, found in claims if not found.leaves_float()]
    return sorted(quantizing or claims, key=lambda claim: claim[0].priority)[-1][1]  # stable: the later one wins
