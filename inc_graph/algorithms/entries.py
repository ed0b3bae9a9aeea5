"""The table of own methods: name of the algorithm -> its entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from inc_graph.errors import ConfigError

__all__ = ["OFFERS_LOAD", "algos_mapping", "register_algo"]

E = TypeVar("E", bound=Callable[..., Any])

algos_mapping: dict[str, Callable[..., Any]] = {}
"""Own methods in the order in which they were registered, which is the order in which a model goes through them. The
methods of the library are not among them: they are pipelines of passes, and `prepare` and `convert` run these."""

OFFERS_LOAD: set[str] = set()
"""Names of the entries that can be called with `Mode.LOAD`."""


def register_algo(name: str, *, load: bool = False) -> Callable[[E], E]:
    """Decorator: enter a function as what is done for the configs called `name`.

    The function is called `entry(model, configs_mapping, mode=..., **kwargs)` and returns the model. `configs_mapping`
    holds (path, class name) -> config of every module that a config of the call speaks of, also those of other
    algorithms: `config.name` tells which are its own. `kwargs` are `example_inputs`, and with `Mode.QUANTIZE` also
    `run_fn` and `run_args`.

    Entered once more, the name stands for the new function. One of a method of the library replaces that method.

    Args:
        name: Of the config class, as `register_config` was given it.
        load: The function can also be called with `Mode.LOAD`, on the float model: it makes a model whose `state_dict`
            has the names and shapes of a converted one, and the values are loaded afterwards. Without it, a saved model
            is made by `Mode.PREPARE` and `Mode.CONVERT`, without calibration data.

    Raises:
        ConfigError: `name` is not a name, or what is decorated cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an algorithm needs a name, not {name!r}", hint='@register_algo("my_algorithm")')

    def enter(function: E) -> E:
        if not callable(function):
            raise ConfigError(f"the entry of {name!r} must be a function, not {function!r}")
        algos_mapping[name] = function
        (OFFERS_LOAD.add if load else OFFERS_LOAD.discard)(name)
        return function

    return enter
