"""Several configs as one: `a + b`. Where two claim an operator, the one with the higher priority gets it."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from inc_graph.errors import ConfigError, PassError
from inc_graph.passmanager import Pipeline
from inc_graph.quantization.base_config import BaseConfig
from inc_graph.quantization.fields import Field
from inc_graph.recipe import HALF_DTYPES, Recipe
from inc_graph.registry import CONFIGS

__all__ = ["ComposableConfig", "as_config"]


def as_config(value: Any) -> BaseConfig:
    """A config; a dictionary {algorithm: {"global": ..., "local": ...}} becomes one.

    Raises:
        ConfigError: it is neither, or the dictionary has a mistake; names it.
    """
    if isinstance(value, BaseConfig):
        return value
    if isinstance(value, Mapping):
        found = ComposableConfig.from_dict(value)
        return found.config_list[0] if len(found.config_list) == 1 else found
    raise ConfigError(f"quant_config must be a config, not {value!r}", hint="for example StaticQuantConfig()")


class ComposableConfig(BaseConfig):
    """Configs that apply to one model together, each with its own local settings.

    Args:
        configs: They are not copied, and not changed.
    """

    name: ClassVar[str] = "composable_config"
    fields: ClassVar[dict[str, Field]] = {}

    def __init__(self, configs: Iterable[BaseConfig]) -> None:
        given, configs = configs, list(configs) if isinstance(configs, Iterable) else []
        if not isinstance(given, Iterable) or not all(isinstance(c, BaseConfig) for c in configs):
            raise ConfigError(f"ComposableConfig needs a list of configs, not {given!r}")
        flat = [inner for c in configs for inner in (c.config_list if isinstance(c, ComposableConfig) else [c])]
        super().__init__()
        self._configs = flat

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "white_list" and value is not None and not (isinstance(value, str) and value == "*"):
            raise ConfigError("white_list of a composition", hint="give it to one of the configs")
        super().__setattr__(key, value)

    @property
    def config_list(self) -> list[BaseConfig]:
        """The configs, in the order they were added."""
        return list(self._configs)

    def set_local(self, operator_name_or_list: Any, config: BaseConfig) -> Any:
        """Refused: it would be unclear which of the configs is meant."""
        raise ConfigError("set_local on a composition", hint="call it on one of the configs, before adding them")

    def __add__(self, other: BaseConfig) -> BaseConfig:
        if not isinstance(other, BaseConfig):
            return NotImplemented
        return ComposableConfig([self, other])

    def reaches(self, other: BaseConfig) -> bool:
        return self is other or any(c.reaches(other) for c in self._configs)

    def _as_dict(self, own: Callable[[BaseConfig], dict[str, Any]]) -> dict[str, Any]:
        """{algorithm: dictionary of its config}; a list of them where an algorithm occurs more than once."""
        found: dict[str, Any] = {}
        for config in self._configs:
            found.setdefault(config.name, []).append(config._as_dict(own))
        return {name: values[0] if len(values) == 1 else values for name, values in found.items()}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], config_registry: Any = None) -> ComposableConfig:
        """Inverse of `to_dict`. ConfigError names an unknown algorithm."""
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"ComposableConfig is read from a dictionary, not from {config_dict!r}")
        found: list[BaseConfig] = []
        for name, values in config_dict.items():
            kind = CONFIGS.get(name)
            found += [kind.from_dict(v) for v in (values if isinstance(values, list) else [values])]
        return cls(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ComposableConfig) and self._configs == other._configs

    __hash__ = None

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._configs)) or "ComposableConfig([])"

    def is_set(self) -> bool:
        return any(c.is_set() for c in self._configs)

    def expand(self) -> list[Any]:
        """A composition for each choice of one expansion of every config, the last config's changing fastest."""
        if not self._configs:
            return []
        choices = itertools.product(*(c.expand() for c in self._configs))
        return [type(self)([copy.copy(c) for c in parts]) for parts in choices]

    def leaves_float(self) -> bool:
        return all(c.leaves_float() for c in self._configs)

    @property
    def global_config(self) -> Any:
        return ComposableConfig([c.global_config for c in self._configs])

    @classmethod
    def register_supported_configs(cls) -> list[Any]:
        """A composition supports what its configs support."""
        raise NotImplementedError("call it on the class of one of the configs")

    @classmethod
    def get_config_set_for_tuning(cls) -> Any:
        raise NotImplementedError("call it on the class of one of the configs")

    def get_model_info(self, model: Any, example_inputs: Any = None) -> list[tuple[str, str]]:  # type: ignore[override]
        """(path, class name) of each module that one of the algorithms is for."""
        found = dict.fromkeys(pair for c in self._configs for pair in c.get_model_info(model, example_inputs))
        return list(found)

    def to_config_mapping(
        self, config_list: Sequence[BaseConfig] | None = None, model_info: Iterable[tuple[str, str]] | None = None
    ) -> OrderedDict[Any, Any]:
        return super().to_config_mapping(self._configs if config_list is None else config_list, model_info)

    # ------------------------------------------------------------------------------------------------------ as a recipe
    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether one of the methods does."""
        return any(c.needs_calibration for c in self._configs)

    def _ranked(self) -> list[BaseConfig]:
        """In rising priority; where two claim an operator in the same way, the later rule wins."""
        return sorted(self._configs, key=lambda c: c.rank)

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        """One recipe of all configs.

        Raises:
            NotImplementedError: if this version does not have one of the algorithms.
            ConfigError: if there is no config, or one model cannot be taken through the pipelines of all.
        """
        if not self._configs:
            raise ConfigError("an empty composition says nothing", hint="add a config to it")
        ranked = self._ranked()
        recipes = [c.recipe(backend, supported) for c in [c for c in ranked if not c._leaves_all_float()] or ranked]
        self._check_excluded()
        prepare, convert = (_merged([getattr(r, stage) for r in recipes]) for stage in ("prepare", "convert"))
        limited = next((r.supported for r in recipes if r.supported is not None), None)
        return replace(recipes[0], rules=self.rules(), prepare=prepare, convert=convert, supported=limited)

    def _check_excluded(self) -> None:
        """ConfigError if one config gives the rest of the model a precision that another excludes."""
        for config in self._configs:
            for name in config.get_params_dict().get("excluded_precisions", ()):
                if any(other.half == HALF_DTYPES[name] for other in self._configs):
                    message = f"{type(config).__name__} excludes {name}, and another config here asks for it"
                    raise ConfigError(message, hint=f"leave {name!r} out of excluded_precisions")

    def _members(self) -> Sequence[BaseConfig]:
        return self._configs

    def __copy__(self) -> ComposableConfig:
        return ComposableConfig(self._configs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposableConfig:
        return ComposableConfig(copy.deepcopy(self._configs, memo))


def _merged(pipelines: list[str]) -> str:
    """The text of one pipeline that does what each of these does."""
    try:
        return str(Pipeline.merged([Pipeline.parse(text) for text in dict.fromkeys(pipelines)]))
    except PassError as e:
        raise ConfigError(f"these configs cannot be combined in one model: {e.message}") from e


BaseConfig._composition = ComposableConfig
