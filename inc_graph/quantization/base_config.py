"""The machinery of all configs: one table of fields drives construction, validation, values, files and tuning.

A config class is a table of fields, and what it means for one operator (`op_quant`) and for the model (`recipe`).
"""

from __future__ import annotations

import copy
import difflib
import inspect
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeVar

from torch import nn

from inc_graph.algorithms.entries import algos_mapping
from inc_graph.errors import ConfigError, IncError, MissingError
from inc_graph.quantization.fields import DEFAULT_WHITE_LIST, Field, unboxed, unshared
from inc_graph.quantization.mapping import config_mapping, entries_of, type_of
from inc_graph.quantization.own_fields import fields_of
from inc_graph.quantization.where import check_key, shown
from inc_graph.quantization.written_config import WrittenConfig
from inc_graph.recipe import OpQuant, Recipe, WhereRule
from inc_graph.registry import CONFIGS

__all__ = ["DEFAULT_WHITE_LIST", "BaseConfig", "OperatorConfig", "register_config"]

C = TypeVar("C", bound="BaseConfig")


class OperatorConfig(NamedTuple):
    """What a config class supports: its fields with all their legal values as lists, for these operators."""

    config: BaseConfig
    operators: list[Any]
    valid_func_list: Sequence[Callable[..., Any]] = ()


class BaseConfig(WrittenConfig):
    """Base of the configs. Subclasses set `name` and `fields`.

    Args:
        *args, **values: The fields of the class, and `white_list`: "*" for every operator, or a list of module names
            (regex), classes, functions and predicates (see `set_local`) to quantize. A list of legal values makes a
            field a set of candidates for `expand` and `autotune`.

    Raises:
        ConfigError: on an unknown field (with the nearest name) or an illegal value (with the legal ones).

    Attributes:
        name: Of the algorithm.
        fields: Field name -> what it may be, in the order of the arguments.
        priority: Where two configs of a `ComposableConfig` claim one operator, the higher one gets it.
        yields: Every other config gets it, whatever the priorities.
        tuning: Candidates of `get_config_set_for_tuning`.
        on_client: Fields that have other defaults on a client processor.
        operators: Module classes and functions that the algorithm is for.
        scope: With commas, the operator types that it speaks of if nothing more is said; "": all that it is able to do.
        supported_configs: Filled by `register_supported_configs`.
    """

    name: ClassVar[str] = "base_config"
    fields: ClassVar[dict[str, Field]] = {}
    priority: ClassVar[int] = 0
    yields: ClassVar[bool] = False
    tuning: ClassVar[dict[str, list[Any]]] = {}
    on_client: ClassVar[dict[str, Any]] = {}
    operators: ClassVar[tuple[Any, ...]] = ()
    scope: ClassVar[str] = ""
    supported_configs: ClassVar[list[OperatorConfig]] = []
    params_list: ClassVar[list[str]] = []
    non_tunable_params: ClassVar[list[str]] = ["white_list"]
    needs_calibration: ClassVar[bool] = True
    _composition: ClassVar[Any] = None  # ComposableConfig, which is a config itself
    _is_initialized: bool = False

    if TYPE_CHECKING:  # the fields are in a table

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls) and "fields" not in vars(cls):  # written for neural_compressor
            cls.fields = {**cls.fields, **fields_of(cls)}
        cls.params_list = [n for n in cls.fields if n != "white_list"]
        cls.non_tunable_params = ["white_list", *(n for n in cls.params_list if not cls.fields[n].tunable)]
        if cls.__init__ is not BaseConfig.__init__:
            return
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        params = [inspect.Parameter(n, kind, default=f.default) for n, f in cls._arguments().items()]
        cls.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]

    @classmethod
    def _arguments(cls) -> dict[str, Field]:
        """Fields and the white list, in the order of the arguments: those of neural_compressor, then ours."""
        fields = cls.fields if "white_list" in cls.fields else {**cls.fields, "white_list": Field(DEFAULT_WHITE_LIST)}
        return {n: f for ours in (False, True) for n, f in fields.items() if f.ours is ours}

    def __init__(self, *args: Any, **values: Any) -> None:
        names = list(self._arguments())
        if len(args) > len(names):
            raise ConfigError(f"{type(self).__name__} takes at most {len(names)} arguments, got {len(args)}")
        given = dict(zip(names, args, strict=False))
        if twice := sorted(set(given) & set(values)):
            raise ConfigError(f"{type(self).__name__}: {', '.join(twice)} given twice")
        values = {**given, **values}
        for key in values:
            if key not in names:
                self._unknown(key)
        self._local: dict[Any, BaseConfig] = {}
        self.white_list = values.pop("white_list", DEFAULT_WHITE_LIST)
        for key in self.params_list:
            spec = self.fields[key]
            value = values.get(key, spec.default)
            setattr(self, key, copy.deepcopy(value) if spec.stored else value)
        self._settle()
        self._is_initialized = True

    def _settle(self) -> None:
        """Fields that depend on others, once all are set; and what no two fields may be together."""

    def without_effect(self) -> list[str]:
        """Fields that were set and change nothing beside the others, each "field=value: why"."""
        return []

    def _post_init(self) -> None:
        """Classes written for neural_compressor call it at the end of `__init__`. There is nothing left to do."""

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "white_list":
            value = _white_list(value)
        elif key in self.fields:
            spec = self.fields[key]
            value = unboxed(value) if spec.stored else value
            if spec.candidates(value):
                value = [spec.kept(v) for v in value]
            elif (expected := spec.check(value)) is not None:
                words = re.findall(r"'(\w+)'", expected) if isinstance(value, str) else []
                near = difflib.get_close_matches(str(value), words, 1, 0.5)
                message = f"{type(self).__name__}.{key} must be {expected}, not {value!r}"
                raise ConfigError(message, hint=f"did you mean {near[0]!r}?" if near else None)
            else:
                value = spec.kept(value)
        elif not key.startswith("_") and not isinstance(getattr(type(self), key, None), property):
            self._unknown(key)
        super().__setattr__(key, value)

    def _unknown(self, key: str) -> NoReturn:
        near = difflib.get_close_matches(key, self._arguments(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"fields: {', '.join(self.fields) or '(none)'}"
        raise ConfigError(f"{type(self).__name__} has no field {key!r}", hint=hint)

    # -------------------------------------------------------------------------------------------------- local settings
    def set_local(self: C, operator_name_or_list: Any, config: BaseConfig) -> C:
        """Another config for some operators; one that leaves operators float (`dtype="fp32"`) leaves these float.

        Args:
            operator_name_or_list: A list of, or one of
                a module name: regular expression, matched at the start (`fc1` is also `fc10`, `fc1$` is not);
                a module class, such as `torch.nn.Linear`;
                a function that is an operator, such as `torch.matmul`;
                a predicate: any other function, called with each `OperatorInfo`.
            config: It is not copied; what it says when `prepare` is called counts.

        The most specific setting wins: a name that is the whole path of the module, a name that its path begins with, a
        predicate, a class or function, the config itself; among equals the one said last.

        Raises:
            ConfigError: if `config` is not a config, is a composition, or has local settings or a white list of its
                own, or an entry is none of these.
        """
        if not isinstance(config, BaseConfig):
            raise ConfigError(f"set_local needs a config, not {config!r}", hint=f"for example {type(self).__name__}()")
        if isinstance(config, self._composition):
            hint = "one config says what becomes of an operator; add the others with a white_list of their own"
            raise ConfigError("set_local takes one config, not a composition", hint=hint)
        several = isinstance(operator_name_or_list, list | tuple | set)
        items = operator_name_or_list if several else [operator_name_or_list]
        if not items:
            raise ConfigError("set_local got an empty list, which names no operator", hint="name one, or leave it out")
        for item in items:
            check_key(item)
        if config is self:  # what it says of all operators, for these
            config = self.global_config
        elif config.reaches(self):
            raise ConfigError("set_local: the config is set in itself", hint="give a config of its own")
        for item in items:
            _check_inner(item, config)
        for item in items:
            self._local.pop(item, None)  # the last said goes to the end
            self._local[item] = config
        return self

    def reaches(self, other: BaseConfig) -> bool:
        """Whether `other` is this config or among its local settings, at any depth."""
        return self is other or any(c.reaches(other) for c in self._local.values())

    @property
    def local_config(self) -> dict[Any, BaseConfig]:
        """Name, class, function or predicate -> config, in the order said."""
        return dict(self._local)

    @property
    def global_config(self: C) -> C:
        """What it says of all operators: the fields, without local settings and white list."""
        new = copy.copy(self)
        new._local = {}
        new.white_list = DEFAULT_WHITE_LIST
        return new

    def __copy__(self: C) -> C:
        """Values and lists of its own; the configs of the local settings are the same."""
        new = object.__new__(type(self))
        vars(new).update({key: unshared(value) for key, value in vars(self).items()})
        return new

    def __eq__(self, other: object) -> bool:
        return (
            type(self) is type(other)
            and isinstance(other, BaseConfig)
            and self.get_params_dict() == other.get_params_dict()
            and self.white_list == other.white_list
            and list(self._local.items()) == list(other._local.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        changed = [f"{k}={v!r}" for k, v in self.to_diff_dict(self).items()]
        if self.white_list != DEFAULT_WHITE_LIST:
            changed.append(f"white_list=[{', '.join(map(shown, self.white_list))}]")
        local = "".join(f".set_local({shown(k)}, {c!r})" for k, c in self._local.items())
        return f"{type(self).__name__}({', '.join(changed)}){local}"

    def __add__(self, other: BaseConfig) -> BaseConfig:
        """Both configs, in a new `ComposableConfig`; neither is changed."""
        if not isinstance(other, BaseConfig):
            return NotImplemented
        return self._composition([self, other])

    # ----------------------------------------------------------- called by classes written for neural_compressor
    @staticmethod
    def _is_op_type(name: Any) -> bool:
        """Whether a local setting speaks of a class or function, not of a name."""
        return not isinstance(name, str)

    @staticmethod
    def _op_type_to_str(op_type: Callable[..., Any]) -> str:
        """The name of a class or function."""
        return shown(op_type)

    def _get_op_name_op_type_config(self) -> tuple[dict[str, BaseConfig], dict[str, BaseConfig]]:
        """The local settings by the name of a class or function, and those by the name of a module."""
        of_types = {self._op_type_to_str(key): c for key, c in self._local.items() if self._is_op_type(key)}
        return of_types, {key: c for key, c in self._local.items() if not self._is_op_type(key)}

    # ---------------------------------------------------------------------------------------------------------- tuning
    def is_set(self) -> bool:
        """Whether a field, here or in a local setting, holds candidates."""
        own = any(self.fields[k].candidates(v) for k, v in self.get_params_dict().items())
        return own or any(c.is_set() for c in self._local.values())

    def expand(self: C) -> list[C]:
        """One config for each combination of candidates; one if there are none.

        The last field changes faster than those before it, and the local settings, in the order said, faster still. A
        config that is set for several operators is one choice for all of them.
        """
        chosen = {k: v for k, v in self.get_params_dict().items() if self.fields[k].candidates(v)}
        inner = {id(c): c.expand() for c in self._local.values()}
        found = []
        for values in itertools.product(*chosen.values(), *inner.values()):
            new = copy.copy(self)
            for key, value in zip(chosen, values, strict=False):
                setattr(new, key, copy.deepcopy(value))
            made = dict(zip(inner, map(copy.copy, values[len(chosen) :]), strict=True))
            new._local = {key: made[id(c)] for key, c in self._local.items()}
            new._settle()
            found.append(new)
        return found

    @classmethod
    def get_config_set_for_tuning(cls) -> Any:
        """A config of this class with the candidates that are worth trying."""
        return cls(**cls.tuning)

    @classmethod
    def get_predefined_configs(cls: type[C]) -> dict[Any, C]:
        """Processor type -> default config."""
        from inc_graph.utils.processor import ProcessorType

        return {ProcessorType.Client: cls(**cls.on_client), ProcessorType.Server: cls()}

    # ------------------------------------------------------------------------------------------------ what it speaks of
    @classmethod
    def register_supported_configs(cls) -> list[OperatorConfig]:
        """Fill and return `supported_configs`: all legal values of fields that have only a few, for `operators`."""
        ranges = {k: list(f.choices) for k, f in cls.fields.items() if f.tunable and len(f.choices) > 1}
        cls.supported_configs = [OperatorConfig(cls(**ranges), list(cls.operators))]
        return cls.supported_configs

    @classmethod
    def validate(cls, user_config: BaseConfig) -> None:
        """ConfigError if the config is not of this class. (Its values were checked when they were set.)"""
        if not isinstance(user_config, cls):
            raise ConfigError(f"expected a {cls.__name__}, not {user_config!r}")

    @classmethod
    def get_model_info(cls, model: nn.Module, example_inputs: Any = None) -> list[tuple[str, str]]:
        """(path, class name) of each module of the model that the algorithm is for; a shared one under each name."""
        kinds = tuple(t for t in cls.operators if isinstance(t, type))
        names = {t for t in cls.operators if isinstance(t, str)}
        return [
            (name, type_of(name, m))
            for name, m in model.named_modules(remove_duplicate=False)
            if (isinstance(m, kinds) or type(m).__name__ in names) and not getattr(m, "quantized", False)
        ]

    def to_config_mapping(
        self, config_list: Sequence[BaseConfig] | None = None, model_info: Iterable[tuple[str, str]] | None = None
    ) -> OrderedDict[Any, Any]:
        """(path, class name) -> the config that module gets, float ones included.

        Args:
            config_list: Configs in rising importance; None: this one.
            model_info: From `get_model_info`.
        """
        return config_mapping([self] if config_list is None else list(config_list), list(model_info or ()))

    # ------------------------------------------------------------------------------------------------------ as a recipe
    @property
    def rank(self) -> int:
        """What counts where configs of a composition claim one operator: the priority, and -1 for one that yields."""
        return -1 if self.yields else self.priority

    def leaves_float(self) -> bool:
        """Whether the fields say that operators stay float."""
        return False

    @property
    def half(self) -> Any:
        """The half precision that the fields give operators in the place of a quantization."""
        return None

    def _leaves_all_float(self) -> bool:
        """Whether it leaves every operator float that it speaks of, in local settings too."""
        return self.leaves_float() and all(c._leaves_all_float() for c in self._local.values())

    def op_quant(self) -> OpQuant | None:
        """What these fields mean for one operator; None: float, or left to the entry of an own method.

        Raises:
            NotImplementedError: if this version does not have the algorithm.
        """
        if self.leaves_float() or self.name in algos_mapping:
            return None
        raise self._missing()

    def _missing(self) -> MissingError:
        text = f"{type(self).__name__}: this version does not have the algorithm '{self.name}'"
        own = not type(self).__module__.startswith("inc_graph.")
        return MissingError(f"{text}: enter yours with register_algo({self.name!r})" if own else text)

    def checkpoint(self) -> str:
        """The folder that the weights of an empty model are read from; "" if the config names none."""
        members = [c for m in self._members() for c in (m, *m._local.values())]
        return next((path for c in members if (path := vars(c).get("model_path"))), "")

    def implied(self) -> tuple[tuple[str, BaseConfig], ...]:
        """Settings by name that the fields imply, such as a float head; any setting of the user's is stronger."""
        return ()

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        """The recipe for a backend that has kernels for the operator types `supported` (None: all).

        Raises:
            NotImplementedError: as `op_quant`.
        """
        raise self._missing()

    def rules(self) -> tuple[WhereRule, ...]:
        """Rules of this config and its local settings, from the general to the specific."""
        if self.is_set():
            hint = "try them with autotune, or take one of config.expand()"
            raise ConfigError(f"{self!r} holds lists of candidates", hint=hint)
        for member in self._members():
            for key, config in member._local.items():
                _check_inner(key, config)  # once more: it may have got some since it was set
        entries = entries_of(self._members())
        return tuple(WhereRule(e.where, None if e.floats else e.config.op_quant(), e.origin) for e in entries)

    def predicates(self) -> dict[int, Callable[[Any], Any]]:
        """Index in `rules()` -> predicate of that rule."""
        return {i: e.key for i, e in enumerate(entries_of(self._members())) if e.where.kind == "predicate"}

    def _members(self) -> Sequence[BaseConfig]:
        return [self]


def _check_inner(key: Any, config: BaseConfig) -> None:
    """ConfigError if a config for local use has local settings or a white list: nobody would look at them."""
    if config._local or config.white_list != DEFAULT_WHITE_LIST:
        what = "local settings" if config._local else "a white list"
        hint = "give these names to set_local of the outer config; its rules apply to the whole model"
        raise ConfigError(f"the config in set_local({shown(key)}) has {what} of its own", hint=hint)


def _white_list(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value == DEFAULT_WHITE_LIST):
        return DEFAULT_WHITE_LIST
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"white_list must be '*' or a list of names and types, not {value!r}")
    value = list(value)
    for item in value:
        check_key(item)
    return value


def register_config(
    framework_name: str = "torch", algo_name: str = "", priority: int | float = 0
) -> Callable[[type[C]], type[C]]:
    """Class decorator: enter a config class under the name of its algorithm.

    `from_dict` of compositions, `get_all_config_set` and the dictionary form of configs find it there. A class that is
    defined once more takes the place of the earlier one.

    Raises:
        IncError: another class has the name.
    """

    def enter(cls: type[C]) -> type[C]:
        cls.name = algo_name or cls.name
        cls.priority = int(priority) if priority else cls.priority
        try:
            CONFIGS.add(cls.name, cls)
        except IncError:
            old = CONFIGS.get(cls.name)
            if (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
                raise
            CONFIGS.remove(cls.name)  # the cell of a notebook was run again
            CONFIGS.add(cls.name, cls)
        return cls

    return enter
