"""What `autotune` tries, in which order, and when it is content."""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inc_graph.errors import ConfigError
from inc_graph.quantization.base_config import BaseConfig

__all__ = ["ConfigLoader", "ConfigSet", "Evaluator", "Sampler", "SequentialSampler", "TuningConfig", "default_sampler"]


STRATEGIES = ("configs", "sensitivity")


class ConfigSet(Sequence[BaseConfig]):
    """Configs to try: what was given, with every list of candidates expanded, each config once.

    Two configs are the same if they are equal, local settings included. None of them is changed.

    Args:
        configs: One config, or a list or tuple of them, nested or not.

    Raises:
        ConfigError: something else is in there, or nothing at all.
    """

    def __init__(self, configs: Any) -> None:
        self._configs: list[BaseConfig] = []
        for config in _flat(configs):
            self._configs += [c for c in config.expand() if c not in self._configs]
        if not self._configs:
            raise ConfigError("there is no config to try", hint="give TuningConfig a config_set")

    @classmethod
    def generate_config_set(cls, config_set: Any) -> ConfigSet:
        """The configs of one config, of a list of them, or of a `ConfigSet`."""
        return config_set if isinstance(config_set, cls) else cls(config_set)

    def __getitem__(self, index: Any) -> Any:
        return self._configs[index]

    def __len__(self) -> int:
        return len(self._configs)


def _flat(configs: Any) -> Iterator[BaseConfig]:
    if isinstance(configs, BaseConfig):
        yield configs
    elif isinstance(configs, Iterable) and not isinstance(configs, str | bytes | Mapping):
        for config in configs:
            yield from _flat(config)
    else:
        raise ConfigError(f"config_set takes configs, not {configs!r}", hint="for example StaticQuantConfig()")


class Sampler:
    """The order in which configs are tried: iterating gives indices into `config_source`. Derive and override.

    Args:
        config_source: The configs.
    """

    def __init__(self, config_source: ConfigSet) -> None:
        self.config_source = config_source

    def __iter__(self) -> Iterator[int]:
        raise NotImplementedError(f"{type(self).__name__} has no __iter__")


class SequentialSampler(Sampler):
    """In the order given."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.config_source)))


default_sampler = SequentialSampler


class ConfigLoader:
    """The configs of a set in the order of a sampler, none of them twice.

    Args:
        config_set: As `ConfigSet` takes them.
        sampler: A class derived from `Sampler`, or a function that takes a `ConfigSet` and gives indices.

    Raises:
        ConfigError: in iterating: the sampler gives no indices, none at all, or one of no config.
    """

    def __init__(self, config_set: Any, sampler: Callable[[ConfigSet], Iterable[int]] = SequentialSampler) -> None:
        self.config_set = ConfigSet.generate_config_set(config_set)
        self._sampler = sampler

    def __iter__(self) -> Iterator[BaseConfig]:
        seen = set()
        given = self._sampler(self.config_set)
        try:
            indices = iter(given)
        except TypeError as e:
            raise ConfigError(f"the sampler must give indices of configs, not {given!r}: {e}") from e
        for one in indices:
            index = _index(one)
            if index is None or not 0 <= index < len(self.config_set):
                raise ConfigError(f"the sampler gave {one!r}; there are {len(self.config_set)} configs, from 0")
            if index not in seen:
                seen.add(index)
                yield self.config_set[index]
        if not seen:
            raise ConfigError(f"the sampler gave no index, so none of {len(self.config_set)} configs is tried")


def _index(value: Any) -> int | None:
    """A whole number, also of NumPy or in a tensor; None if it is none."""
    try:
        return None if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) else operator.index(value)
    except TypeError:
        return None


@dataclass(frozen=True)
class _Metric:
    name: str
    function: Callable[..., Any]
    weight: float


class Evaluator:
    """A score from one or more functions of the model: the sum of what they give, each times its weight.

    Args:
        eval_fns: `f(model) -> number`, or a dictionary with it under "eval_fn" and, if wanted, "weight" (1.0) and
            "name"; or a list of such dictionaries.
        higher_is_better: Whether a larger sum is better. A negative weight turns a single metric around.

    Raises:
        ConfigError: `eval_fns` is something else; names the entry.
    """

    def __init__(self, eval_fns: Any = None, higher_is_better: bool = True) -> None:
        self.higher_is_better = higher_is_better
        self.metrics: list[_Metric] = []
        if eval_fns is not None:
            self.set_eval_fn_registry(eval_fns)

    def set_eval_fn_registry(self, eval_fns: Any) -> None:
        """Replace the functions."""
        many = eval_fns if isinstance(eval_fns, list | tuple) else [eval_fns]
        self.metrics = [_metric(one, i) for i, one in enumerate(many)]

    def get_number_of_eval_functions(self) -> int:
        """How many functions there are."""
        return len(self.metrics)

    def self_check(self) -> None:
        """ConfigError if there is no function."""
        if not self.metrics:
            raise ConfigError("autotune needs an eval_fn", hint="a function of the model that gives a number")

    def evaluate(self, model: Any, *args: Any) -> float:
        """The score of a model. ConfigError names the function that gives no number."""
        self.self_check()
        return sum([m.weight * _number(m, m.function(model, *args)) for m in self.metrics])

    def better(self, score: float, than: float) -> bool:
        """Whether a score is better than another one; NaN is worse than everything."""
        if math.isnan(score) or math.isnan(than):
            return not math.isnan(score) and math.isnan(than)
        return score > than if self.higher_is_better else score < than


def _metric(entry: Any, index: int) -> _Metric:
    data: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"eval_fn": entry}
    where = f"eval_fn[{index}]"
    if unknown := set(data) - {"eval_fn", "weight", "name"}:
        raise ConfigError(f"{where} has unknown entries {sorted(unknown)}", hint='it takes "eval_fn", "weight", "name"')
    function, weight = data.get("eval_fn"), data.get("weight", 1.0)
    if not callable(function):
        raise ConfigError(f"{where} must be a function of the model, not {function!r}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"the weight of {where} must be a finite number, not {weight!r}")
    name = data.get("name") or getattr(function, "__name__", type(function).__name__)
    return _Metric(str(name), function, float(weight))


def _number(metric: _Metric, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConfigError(f"the metric {metric.name!r} gave {value!r}, not a number") from e


@dataclass
class TuningConfig:
    """What `autotune` tries, and when it stops.

    Attributes:
        config_set: A config, or a list of them. A config with lists of candidates stands for all combinations.
        sampler: The order: a class derived from `Sampler`.
        tolerable_loss: How much worse than the float model the result may be; negative asks for something better.
        max_trials: At most so many configs are tried.
        relative: Whether `tolerable_loss` is a share of the size of the float model's score (of 0, nothing is lost
            then), or a difference of scores.
        higher_is_better: Whether a larger score is better.
        timeout: Seconds after which no other trial is begun, and no damage of layers measured; None for no limit.
        journal: A file that each trial is written to at once. If it is there, what it holds is not tried again, so that
            an interrupted search goes on. Default: a new file in the folder given to
            `inc_graph.common.set_workspace`, or the last one of the same search in that given to `set_resume_from`;
            without any of them nothing is written.
        strategy: "configs": one config after the other. "sensitivity": the damage of each layer is measured once, and
            the search is for the layers that have to stay float, or need more bits.
        sensitivity_calls: That damage is measured on the inputs of the first so many calls that `run_fn` makes.

    Raises:
        ConfigError: a field has a value that makes no sense; names it.
    """

    config_set: Any = None
    sampler: Callable[[ConfigSet], Iterable[int]] = default_sampler
    tolerable_loss: float = 0.01
    max_trials: int = 100
    relative: bool = True
    higher_is_better: bool = True
    timeout: float | None = None
    journal: str | os.PathLike[str] | None = None
    strategy: str = "configs"
    sensitivity_calls: int = 2

    def __post_init__(self) -> None:
        if self.config_set is not None:
            self.config_set = ConfigSet.generate_config_set(self.config_set)
        if not callable(self.sampler):
            raise ConfigError(f"sampler must be a class derived from Sampler, not {self.sampler!r}")
        _check("tolerable_loss", self.tolerable_loss, "a finite number", math.isfinite)
        if self.timeout is not None:
            _check("timeout", self.timeout, "seconds, more than 0, or None", lambda v: v > 0)
        for name in ("max_trials", "sensitivity_calls"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1 on, not {value!r}")
        if self.strategy not in STRATEGIES:
            near = difflib.get_close_matches(str(self.strategy), STRATEGIES, 1)
            message = f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, not {self.strategy!r}"
            raise ConfigError(message, hint=f"did you mean {near[0]!r}?" if near else None)
        if self.strategy == "sensitivity" and self.sampler is not default_sampler:
            hint = "leave it out: the first config of config_set is the one to start from"
            raise ConfigError("strategy='sensitivity' chooses what to try by itself, so it takes no sampler", hint=hint)
        if self.journal is not None and not isinstance(self.journal, str | os.PathLike):
            raise ConfigError(f"journal must be the path of a file, not {self.journal!r}")
        for name in ("relative", "higher_is_better"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")

    def limit(self, baseline: float) -> float:
        """The worst score that is still accepted, given that of the float model; an infinite one loses nothing."""
        if math.isinf(baseline):
            return baseline
        allowed = self.tolerable_loss * (abs(baseline) if self.relative else 1.0)
        return baseline - allowed if self.higher_is_better else baseline + allowed

    def accepts(self, score: float, baseline: float) -> bool:
        """Whether a score is within the tolerance. Never for NaN."""
        limit = self.limit(baseline)
        return score >= limit if self.higher_is_better else score <= limit


def _check(name: str, value: Any, what: str, good: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not good(value):
        raise ConfigError(f"{name} must be {what}, not {value!r}")
