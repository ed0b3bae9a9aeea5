"""The error tree: messages, provenance and what each error also is."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from inc_graph import errors
from inc_graph.errors import IncError, SpecError, UnknownNameError


def test_text_has_node_module_and_hint() -> None:
    error = IncError("it broke", node="conv2d_1", module="features.0", hint="do not")
    assert str(error) == "it broke [node 'conv2d_1' in module 'features.0']\n  hint: do not"
    assert str(IncError("it broke")) == "it broke"
    assert str(IncError("it broke", node="a")) == "it broke [node 'a']"
    assert str(IncError("it broke", module="m")) == "it broke [module 'm']"


def test_fx_node_gives_its_name_and_innermost_module() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    assert str(IncError("bad", node=node)) == "bad [node 'x']"
    node.meta["nn_module_stack"] = {"a": ("L['self']", "M"), "b": ("L['self'].layers.0", "B")}
    error = IncError("bad", node=node)
    assert (error.node, error.module) == ("x", "layers.0")
    assert IncError("bad", node=node, module="mine").module == "mine"
    node.meta["nn_module_stack"] = {"a": ("L['self']", "M")}
    assert IncError("bad", node=node).module is None


@pytest.mark.parametrize("name", [n for n in errors.__all__ if not n.endswith("Warning")])
def test_tree(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, IncError)
    error = cls("no 'x'", node="n", hint="h")
    assert str(error) == "no 'x' [node 'n']\n  hint: h"  # a KeyError would print its repr
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is cls and str(twin) == str(error)


def test_errors_are_what_python_users_expect() -> None:
    assert issubclass(errors.ConfigError, ValueError) and issubclass(SpecError, ValueError)
    assert issubclass(UnknownNameError, KeyError)
    assert issubclass(errors.UnusedRuleWarning, errors.IncWarning) and issubclass(errors.IncWarning, UserWarning)


def test_all_is_complete() -> None:
    public = {n for n, v in vars(errors).items() if inspect.isclass(v) and v.__module__ == errors.__name__}
    assert public == set(errors.__all__)
