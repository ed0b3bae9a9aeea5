"""Whom a local setting speaks of: a module name, a class, an operator function, or a predicate; and each as text.

"encoder.layer.0"                     a name: regular expression, matched at the start of module paths
torch.nn.Linear                       type:torch.nn.modules.linear.Linear
torch.matmul                          function:torch.matmul
my_package.is_wide                    predicate:my_package:is_wide
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from inc_graph.errors import ConfigError
from inc_graph.oppattern import OperatorInfo
from inc_graph.recipe import Where, names_of_type
from inc_graph.registry import PATTERNS

__all__ = ["asked", "check_key", "is_predicate", "key_from_text", "key_to_text", "shown", "where_of"]

_FORMS = ("type:", "function:", "predicate:", "name:")
_HOMES = ("torch", "torch.nn.functional", "torch.Tensor", "torch.special", "torch.linalg", "operator")


def check_key(key: Any) -> None:
    """ConfigError if a local setting cannot speak of `key`."""
    where_of(key)


def where_of(key: Any) -> Where:
    """The recipe's form of a key. ConfigError if it is none."""
    if isinstance(key, str):
        return Where("name", key)
    if isinstance(key, type) and issubclass(key, torch.nn.Module):
        return Where("type", names_of_type(key)[1])
    if isinstance(key, torch._ops.OpOverloadPacket):  # all overloads of an operator
        return Where("type", key._qualified_op_name)
    if isinstance(key, torch.nn.Module):
        hint = "give the name it has in the model, or its class"
        raise ConfigError(f"a setting cannot speak of a module object ({type(key).__name__})", hint=hint)
    if callable(key) and not isinstance(key, type):
        if is_predicate(key):
            return Where("predicate", shown(key))
        return Where("type", str(key) if isinstance(key, torch._ops.OpOverload) else names_of_type(key)[1])
    raise ConfigError(f"expected a module name, a module class, a function or a predicate, not {key!r}")


def is_predicate(key: Any) -> bool:
    """Whether a key is a function of the user's that looks at each operator, not an operator itself."""
    if not callable(key) or isinstance(key, type | torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return False
    if any(key is known for _, pattern in PATTERNS.items() for known in pattern.modules):
        return False
    home = getattr(key, "__module__", None)
    if home is None:  # compiled functions such as torch.matmul, or Python ones that were made without a module
        return isinstance(key, types.FunctionType)
    return home.partition(".")[0] not in ("torch", "_operator", "operator", "math")


def asked(predicate: Any, operator: OperatorInfo) -> bool:
    """What a predicate says of an operator. ConfigError, which names both, if it fails."""
    try:
        return bool(predicate(operator))
    except Exception as e:
        name = getattr(predicate, "__name__", repr(predicate))
        hint = "a predicate takes one OperatorInfo: name, op, module_type, weight_shape"
        if operator.weight_shape is None:
            hint += "; weight_shape is None of an operator without a weight, so ask for `op` or for that first"
        raise ConfigError(f"predicate {name} fails for {operator}: {type(e).__name__}: {e}", hint=hint) from e


def shown(key: Any) -> str:
    """A key as messages give it."""
    if isinstance(key, str):
        return repr(key)
    if isinstance(key, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(key)
    return getattr(key, "__name__", None) or repr(key)


# ----------------------------------------------------------------------------------------------------------- as text
def key_to_text(key: Any) -> str:
    """A key as text that `key_from_text` reads back.

    Raises:
        ConfigError: for a predicate that no module has under its name, such as a lambda.
    """
    if isinstance(key, str):
        return f"name:{key}" if key.startswith(_FORMS) else key
    if isinstance(key, torch._ops.OpOverload):
        return f"function:torch.ops.{key.namespace}.{key.__name__}"
    if isinstance(key, torch._ops.OpOverloadPacket):
        return f"function:torch.ops.{key._qualified_op_name.replace('::', '.')}"
    if isinstance(key, type):
        return f"type:{_named(key, f'{key.__module__}.{key.__qualname__}')}"
    if is_predicate(key):
        home, name = getattr(key, "__module__", ""), getattr(key, "__qualname__", "")
        if not name or _find(home, name) is not key:
            hint = "make it a function of a module, or name the operators"
            raise ConfigError(f"the predicate {key!r} cannot be written down", hint=hint)
        return f"predicate:{home}:{name}"
    short, full = names_of_type(key)
    paths = [full, *(f"{home}.{short}" for home in _HOMES)]
    found = next((p for p in paths if _walk(p) is key), None)
    if found is None:
        raise ConfigError(f"the function {key!r} cannot be written down", hint="name the operators, or their class")
    return f"function:{found}"


def key_from_text(text: str) -> Any:
    """Inverse of `key_to_text`. Imports nothing but torch: what a file names has to be imported already.

    Raises:
        ConfigError: for what is not there, or is not of the kind that the text says.
    """
    form, colon, rest = text.partition(":")
    if f"{form}:" not in _FORMS or not colon:
        return text
    if form == "name":
        return rest
    home, _, name = rest.partition(":")
    found = _find(home, name) if form == "predicate" else _walk(rest)
    good: Callable[[Any], bool] = {
        "type": lambda x: isinstance(x, type) and issubclass(x, torch.nn.Module),
        "function": lambda x: callable(x) and not isinstance(x, type) and not is_predicate(x),
        "predicate": is_predicate,
    }[form]
    if found is None or not good(found):
        hint = f"import the module that has {rest.replace(':', '.')} before the config is read"
        raise ConfigError(f"there is no {form} {rest!r} to set locally", hint=hint)
    return found


def _named(key: Any, path: str) -> str:
    if _walk(path) is not key:
        hint = "a class inside of a function has no name to write down: use a module name"
        raise ConfigError(f"the class {key!r} cannot be written down", hint=hint)
    return path


def _find(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _walk(path: str) -> Any:
    """The object a dotted path leads to from a module that is imported, or None."""
    parts = path.split(".")
    for i in range(len(parts) - 1, 0, -1):
        home = ".".join(parts[:i])
        if home == "torch" or (home.startswith("torch.") and home in sys.modules):
            importlib.import_module(home)
        if home in sys.modules and (found := _find(home, ".".join(parts[i:]))) is not None:
            return found
    return None
