"""`docs/surface.md`: every public name of neural_compressor.torch and neural_compressor.common, and what it is here.

What is there, its arguments and the tests that use it are looked up; only reasons are written by hand, below, and a
reason for what is not the case is an error of `tests/test_surface.py`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"

ABSENT = {
    "get_model_info_for_ipex": "the graph says what is in a model: `q_model.report`",
    "get_model_info_for_ipex_xpu": "the graph says what is in a model: `q_model.report`",
}
"""Name -> why it is not here, and what to use instead."""

DIFFERS: dict[str, str] = {}
"""Name -> why its arguments or its value are not the same."""


@dataclass(frozen=True)
class Name:
    """One name of theirs: the module (or class) it is in; its parameters; its value (`...`: not compared)."""

    module: str
    name: str
    parameters: str | None = None
    value: Any = ...

    @property
    def holder(self) -> str:
        """Where it is looked for here."""
        return self.module.replace("neural_compressor.torch", "inc_graph").replace("neural_compressor", "inc_graph")


@functools.cache
def reference() -> tuple[Name, ...]:
    """What `tests/surface_reference.txt` says."""
    found, module = [], ""
    for line in (TESTS / "surface_reference.txt").read_text(encoding="utf-8").splitlines():
        if section := re.fullmatch(r"\[(.+)\]", line):
            module = section[1]
        elif call := re.fullmatch(r"(\w+)\((.*)\)", line):
            found.append(Name(module, call[1], call[2]))
        elif line and not line.startswith("#"):
            name, _, value = line.partition(" = ")
            found.append(Name(module, name, None, ast.literal_eval(value) if value else ...))
    return tuple(found)


@functools.cache
def _holder(path: str) -> Any:
    """A module, or a class in a module; None if there is no such thing."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(_holder(parent), name, None) if parent else None


def find(entry: Name) -> Any:
    """The object of that name here; `...` if there is none (None is a value)."""
    holder = _holder(entry.holder)
    found = getattr(holder, entry.name, ...)
    return getattr(holder(), entry.name, ...) if found is ... and inspect.isclass(holder) else found


# ---------------------------------------------------------------------------------------------------------- signatures
@dataclass(frozen=True)
class Comparison:
    """Why calls (or values) are not the same, and which arguments there are beyond theirs."""

    faults: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


@functools.cache
def _config_arguments() -> dict[str, list[list[Any]]]:
    classes = json.loads((TESTS / "upstream" / "configs.json").read_text(encoding="utf-8"))["classes"]
    return {name: data["arguments"] for name, data in classes.items()}


def _theirs(entry: Name) -> list[tuple[str, Any]]:
    """(parameter, default) in order; `inspect.Parameter.empty` where there is none. `*args` and `**kwargs` are left
    out: what they took in silence is an error here."""
    if entry.parameters is None:
        pairs = [(n, v) for n, v in _config_arguments()[entry.name]]
        return [pair for pair in pairs if not pair[0].startswith("*")]
    function = ast.parse(f"def f({entry.parameters}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    args = [a.arg for a in function.args.args]
    defaults = [inspect.Parameter.empty] * (len(args) - len(function.args.defaults))
    return list(zip(args, [*defaults, *map(ast.literal_eval, function.args.defaults)], strict=True))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else {k: _plain(v) for k, v in value.items()} if isinstance(
        value, dict) else value  # fmt: skip


def _same(theirs: Any, mine: Any) -> bool:
    if theirs is ... or theirs is inspect.Parameter.empty:
        return True
    return _plain(mine) == _plain(theirs) or (isinstance(theirs, bool) and mine == str(theirs))


def compare(entry: Name, mine: Any) -> Comparison:
    """How an object of ours differs from theirs, as far as calls and values go."""
    if entry.value is not ...:
        return Comparison() if mine == entry.value else Comparison((f"it is `{mine!r}`, there `{entry.value!r}`",))
    if entry.parameters is None and not (inspect.isclass(mine) and entry.name in _config_arguments()):
        return Comparison()
    if not callable(mine):
        return Comparison((f"it is `{mine!r}`, there a function",))
    parameters = dict(inspect.signature(mine).parameters)
    faults = []
    for index, (name, default) in enumerate(_theirs(entry)):
        found = parameters.pop(name, None)
        if found is None:
            faults.append(f"no `{name}`")
        elif list(inspect.signature(mine).parameters).index(name) != index:
            faults.append(f"`{name}` is not argument {index + 1}")
        elif not _same(default, found.default):
            faults.append(f"`{name}={found.default!r}`, there `{name}={default!r}`")
    rest = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    faults += [f"`{p.name}` is required" for p in rest if p.default is p.empty]
    return Comparison(tuple(faults), tuple(p.name for p in rest if p.default is not p.empty))


# --------------------------------------------------------------------------------------------------------------- tests
@functools.cache
def _used() -> dict[str, frozenset[str]]:
    """Test file -> names of this library that it uses: imported from it, or attributes of a module of it."""
    return {
        p.name: frozenset(_names_used(ast.parse(p.read_text("utf-8"))))
        for p in sorted(TESTS.rglob("test_*.py"), key=lambda p: p.name)
    }


def _names_used(tree: ast.Module) -> Iterator[str]:
    imported: dict[str, str] = {}
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "inc_graph":
            for alias in node.names:
                imported[alias.asname or alias.name] = alias.name
                if inspect.ismodule(_holder(f"{node.module}.{alias.name}")):
                    modules.add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            modules |= {a.asname or a.name for a in node.names if a.name.split(".")[0] == "inc_graph"}
    if not imported and not modules:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in imported:
            yield imported[node.id]
        elif isinstance(node, ast.Attribute):
            yield f".{node.attr}"  # of whatever it is: enough for members of a class
            if ast.unparse(node.value) in modules:
                yield node.attr


def tests_of(entry: Name) -> list[str]:
    """The files in tests/ that use a name, in alphabetical order."""
    wanted = f".{entry.name}" if inspect.isclass(_holder(entry.holder)) else entry.name
    compared = ["test_surface.py"] if entry.value is not ... else []  # with the value in the reference
    return sorted({*compared, *(file for file, names in _used().items() if wanted in names)})


# ---------------------------------------------------------------------------------------------------------------- page
_HEAD = """\
# What of neural_compressor is here

Every public name of `neural_compressor.torch` and `neural_compressor.common` 3.10. After `neural_compressor.torch` is
replaced by `inc_graph`, and `neural_compressor.common` by `inc_graph.common`, an import gives what this page says.
[Coming from neural_compressor](migrate_from_neural_compressor.md) says what behaves differently.

*Arguments*: "same" is same names, order and defaults; "and" names what there is beyond them. Where theirs take any
keyword argument and ignore it, an unknown one is an error here. *Tests* are the files that use the name, the first
three of them in alphabetical order.

This page is written by `python docs/generate`, and the tests compare it with the code.
"""


def _signature(entry: Name, mine: Any) -> str:
    result = compare(entry, mine)
    if result.faults:
        return "; ".join(result.faults) + (f": {DIFFERS[entry.name]}" if entry.name in DIFFERS else "")
    if entry.value is not ...:
        return "same value"
    if entry.parameters is None and entry.name not in _config_arguments():
        return ""
    more = ", ".join(f"`{m}`" for m in result.more) if len(result.more) < 8 else f"{len(result.more)} more"
    return "same" + (f", and {more}" if more else "")


def _row(entry: Name) -> str:
    mine = find(entry)
    if mine is ...:
        return (
            f"| `{entry.name}` | {'no' if entry.name in ABSENT else '**missing**'} | {ABSENT.get(entry.name, '')} | |"
        )
    files = tests_of(entry)
    shown = ", ".join(f"`{f}`" for f in files[:3]) + (" and more" if len(files) > 3 else "")
    return f"| `{entry.name}` | yes | {_signature(entry, mine)} | {shown or '**none**'} |"


def pages() -> dict[str, str]:
    """File in docs/ -> its text."""
    text, module = [_HEAD], ""
    present = sum(find(e) is not ... for e in reference())
    text.append(f"{present} of {len(reference())} names are here.\n")
    for entry in reference():
        if entry.module != module:
            module = entry.module
            text.append(
                f"\n## {module}\n\nHere `{entry.holder}`.\n\n| name | here | arguments | tests |\n|---|---|---|---|\n"
            )
        text.append(_row(entry) + "\n")
    return {"surface.md": "".join(text)}
