"""Configs as dictionaries, JSON text and files, and back."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from inc_graph.errors import ConfigError, IncWarning
from inc_graph.quantization.fields import DEFAULT_WHITE_LIST, Field, unshared
from inc_graph.quantization.where import key_from_text, key_to_text
from inc_graph.registry import CONFIGS
from inc_graph.utils.files import write_whole

__all__ = ["WrittenConfig"]

_OF_UPSTREAM = ("non_tunable_params", "_is_initialized", "_json_file")  # in its files; they say nothing

C = TypeVar("C", bound="WrittenConfig")


class WrittenConfig:
    """The part of `BaseConfig` that writes and reads it: its fields, its white list and its local settings."""

    _mark: ClassVar[dict[str, Any]] = {"_is_initialized": True}

    if TYPE_CHECKING:  # of BaseConfig
        name: ClassVar[str]
        fields: ClassVar[dict[str, Field]]
        params_list: ClassVar[list[str]]
        non_tunable_params: ClassVar[list[str]]
        white_list: Any
        _local: dict[Any, Any]

        def __init__(self, *args: Any, **values: Any) -> None: ...

        def set_local(self: C, operator_name_or_list: Any, config: Any) -> C: ...

    def get_params_dict(self) -> dict[str, Any]:
        """Field -> value."""
        return {key: unshared(getattr(self, key)) for key in self.params_list}

    def _own_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"non_tunable_params": list(self.non_tunable_params)}
        for key in self.params_list:
            spec, value = self.fields[key], getattr(self, key)
            if spec.stored and not (spec.ours and value == spec.default):
                found[key] = copy.deepcopy(value)
            if not spec.stored and value is not spec.default:
                text = f"{type(self).__name__}.{key} is left out: a file cannot hold it"
                warnings.warn(text, IncWarning, stacklevel=3)
        if self.white_list != DEFAULT_WHITE_LIST:
            found["white_list"] = [key_to_text(key) for key in self.white_list]
        return {**found, **self._mark}

    def to_dict(self) -> dict[str, Any]:
        """Field -> value as JSON takes it; with local settings {"global": ..., "local": {key as text: ...}}.

        Raises:
            ConfigError: for a predicate that cannot be written down (a lambda).
        """
        return self._as_dict(WrittenConfig._own_dict)

    def _as_dict(self, own: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """`to_dict`, with the values of each config from `own`."""
        if not self._local:
            return own(self)
        local: dict[str, Any] = {}
        for key, config in self._local.items():
            inner = config._as_dict(own)
            local[key_to_text(key)] = inner if type(config) is type(self) else {config.name: inner}
        return {"global": own(self), "local": local}

    @classmethod
    def from_dict(cls: type[C], config_dict: Mapping[str, Any]) -> C:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: names the field.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"{cls.__name__} is read from a dictionary, not from {config_dict!r}")
        if "global" not in config_dict and "local" not in config_dict:
            return cls._from_own(config_dict)
        if extra := sorted(set(map(str, config_dict)) - {"global", "local"}):
            raise ConfigError(f"{cls.__name__}: {', '.join(extra)} beside 'global' and 'local'")
        config = cls._from_own(config_dict.get("global") or {})
        local = config_dict.get("local") or {}
        if not isinstance(local, Mapping) or not all(isinstance(key, str) for key in local):
            hint = '{"local": {"fc1": {field: value}}}'
            raise ConfigError(f"{cls.__name__}: 'local' must give a config for each name, not {local!r}", hint=hint)
        for key, inner in local.items():
            config.set_local(key_from_text(key), cls._from_local(inner))
        return config

    @classmethod
    def _from_own(cls: type[C], values: Mapping[str, Any]) -> C:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} is read from a dictionary, not from {values!r}")
        if wrong := [key for key in values if not isinstance(key, str)]:
            raise ConfigError(f"{cls.__name__}: fields have names, not {wrong[0]!r}")
        found = {k: v for k, v in values.items() if k not in _OF_UPSTREAM}
        if isinstance(found.get("white_list"), list):
            found["white_list"] = [key_from_text(k) if isinstance(k, str) else k for k in found["white_list"]]
        return cls(**{k: cls._from_json(k, v) for k, v in found.items()})

    @classmethod
    def _from_json(cls, key: str, value: Any) -> Any:
        """JSON has no tuples: a list becomes one where the default is one."""
        spec = cls.fields.get(key)
        return tuple(value) if spec and isinstance(spec.default, tuple) and isinstance(value, list) else value

    @classmethod
    def _from_local(cls, inner: Any) -> Any:
        if isinstance(inner, Mapping) and len(inner) == 1 and (name := next(iter(inner))) in CONFIGS:
            return CONFIGS.get(name).from_dict(inner[name])
        return cls.from_dict(inner)

    @classmethod
    def to_diff_dict(cls, instance: Any) -> dict[str, Any]:
        """The fields of `instance` that differ from their defaults."""
        mine = instance.get_params_dict()
        return {k: v for k, v in mine.items() if instance.fields[k].stored and v != type(instance)._default(k)}

    @classmethod
    def _default(cls, key: str) -> Any:
        return getattr(cls(), key)

    @staticmethod
    def get_the_default_value_of_param(config: Any, param: str) -> Any:
        """The default of one field."""
        return type(config)._default(param)

    def to_json_string(self, use_diff: bool = False) -> str:
        """JSON text; with `use_diff` of the fields only those that differ from their defaults."""
        data = self._as_dict(_diff) if use_diff else self.to_dict()
        try:
            return json.dumps(data, indent=2) + "\n"
        except TypeError as e:
            raise ConfigError(f"{type(self).__name__} holds what JSON cannot say: {e}") from e

    def to_json_file(self, filename: str | os.PathLike[str]) -> None:
        """Write `to_json_string()` to a file, whole or not at all.

        Raises:
            ConfigError: the file cannot be written, for example because its folder is not there.
        """
        text, path = self.to_json_string(), Path(filename)
        try:
            write_whole(path, text)
        except (OSError, ValueError) as e:  # ValueError: a path without a name
            hint = f"make the folder {path.parent}" if isinstance(e, FileNotFoundError) else None
            raise ConfigError(f"{filename} cannot be written: {e}", hint=hint) from e

    @classmethod
    def from_json_string(cls: type[C], text: str) -> C:
        """Inverse of `to_json_string`. ConfigError if the text is not JSON, or not of this class."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as e:
            raise ConfigError(f"{cls.__name__}: not JSON: {e}") from e
        except RecursionError as e:
            raise ConfigError(f"{cls.__name__}: the JSON text is nested too deeply") from e

    @classmethod
    def from_json_file(cls: type[C], filename: str | os.PathLike[str]) -> C:
        """Read what `to_json_file` wrote. ConfigError names the file."""
        try:
            return cls.from_json_string(Path(filename).read_text(encoding="utf-8"))
        except (ConfigError, OSError, UnicodeDecodeError) as e:
            reason, hint = (e.message, e.hint) if isinstance(e, ConfigError) else (str(e), None)
            raise ConfigError(f"{filename}: {reason}", hint=hint) from e


def _diff(config: Any) -> dict[str, Any]:
    found = config.to_diff_dict(config)
    if config.white_list != DEFAULT_WHITE_LIST:
        found["white_list"] = [key_to_text(key) for key in config.white_list]
    return found
