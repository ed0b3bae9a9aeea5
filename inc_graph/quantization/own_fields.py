"""Fields of config classes that are written for neural_compressor: arguments of `__init__` in the place of a table."""

from __future__ import annotations

import inspect
from typing import Any

from inc_graph.errors import ConfigError
from inc_graph.quantization.fields import Check, Field, anything, unshared

__all__ = ["fields_of"]


def fields_of(cls: type) -> dict[str, Field]:
    """A field for each argument of `cls.__init__` but the white list, and for each other name in `params_list`.

    Every value is legal; a list is a set of candidates, unless the default is a list.

    Raises:
        ConfigError: an argument has no default: `from_dict` and tuning make configs without it.
    """
    found: dict[str, Field] = {}
    for name, parameter in list(inspect.signature(vars(cls)["__init__"]).parameters.items())[1:]:
        if name == "white_list" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            raise ConfigError(f"{cls.__name__}: the argument {name!r} needs a default value")
        found[name] = _field(parameter.default)
    for param in vars(cls).get("params_list", ()):
        found.setdefault(getattr(param, "name", param), _field(None))
    return found


def _field(default: Any) -> Field:
    check: Check = anything if isinstance(default, list) else _no_list
    return Field(default, check, convert=unshared)  # a tuple stays one: a list would be candidates


def _no_list(value: Any) -> str | None:
    return "one value, or a list of values to try" if isinstance(value, list) else None
