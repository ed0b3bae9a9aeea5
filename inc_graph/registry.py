"""Name -> object tables through which the layers find each other.

A registry fills itself the first time it is asked: it imports every public module of its package and loads the entry
points of the group ``inc_graph.<kind>`` that installed distributions declare. So adding a pass, a pattern, an algorithm
or a backend is adding a file, and nothing else has to be edited. The same name for two different objects is an error.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from inc_graph.errors import IncError, IncWarning, UnknownNameError

__all__ = ["ALGORITHMS", "BACKENDS", "CONFIGS", "PASSES", "PATTERNS", "QTYPES", "Registry"]

T = TypeVar("T")
S = TypeVar("S")


class Registry(Generic[T]):
    """A table of named objects of one kind.

    Args:
        kind: What the objects are, in the singular (``"backend"``); used in messages and as the entry point group.
        package: Package whose public modules register into this table when imported, or None.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, tuple[T, str]] = {}
        self._lock = threading.RLock()
        self._state = "new"  # new -> loading -> loaded; back to new if loading fails, so the failure is seen again

    def add(self, name: str, obj: T, *, owner: str | None = None) -> T:
        """Enter ``obj`` under ``name`` and return it. Entering the same (or an equal) object again changes nothing.

        Raises:
            IncError: if the name is empty or taken by another object; the message names both owners.
        """
        if not isinstance(name, str) or not name:
            raise IncError(f"a {self.kind} needs a non-empty string as its name, not {name!r}")
        owner = owner or _owner_of(obj)
        with self._lock:
            if name in self._entries:
                old, old_owner = self._entries[name]
                if old is obj or (type(old) is type(obj) and not isinstance(obj, type) and bool(old == obj)):
                    return obj
                raise IncError(
                    f"{self.kind} '{name}' is registered twice: by {old_owner} and by {owner}",
                    hint="give one of them another name",
                )
            self._entries[name] = (obj, owner)
        return obj

    def register(self, name: str) -> Callable[[S], S]:
        """Decorator form of :meth:`add`."""

        def enter(obj: S) -> S:
            self.add(name, obj)  # type: ignore[arg-type]
            return obj

        return enter

    def get(self, name: str) -> T:
        """The object called ``name``.

        Raises:
            UnknownNameError: if there is none; the message has the nearest names and the hint has all of them.
        """
        if name in self:
            return self._entries[name][0]
        names = self.names()
        near = difflib.get_close_matches(str(name), names, n=3)
        guess = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise UnknownNameError(f"unknown {self.kind} {name!r}{guess}", hint=f"known: {', '.join(names) or '(none)'}")

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._entries)

    def items(self) -> list[tuple[str, T]]:
        """All ``(name, object)`` pairs, sorted by name."""
        return [(name, self._entries[name][0]) for name in self.names()]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name not in self._entries:  # what is registered already needs no discovery
            self._load()
        return name in self._entries

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, package={self.package!r}, entries={len(self._entries)}, {self._state})"

    def remove(self, name: str) -> None:
        """Take ``name`` out again; for tests. Raises :class:`UnknownNameError` if it is not there."""
        self.get(name)
        del self._entries[name]

    def load_folder(self, path: str | Path) -> list[str]:
        """Import every public ``*.py`` file of a folder, once per process, so that its contents register themselves.

        The files may register into any registry. Returns the names of the modules, sorted by file name.

        Raises:
            IncError: if the folder does not exist or a file fails to import (the file is named, the reason is chained).
        """
        folder = Path(path).resolve()
        if not folder.is_dir():
            raise IncError(f"no such folder: {folder}")
        return [_import_file(file) for file in sorted(folder.glob("*.py")) if not file.name.startswith("_")]

    def _load(self) -> None:
        if self._state == "loaded":
            return
        with self._lock:
            if self._state != "new":  # a module being imported asked its own registry
                return
            self._state = "loading"
            try:
                if self.package is not None:
                    _import_package(self.package)
                self._load_entry_points()
                self._state = "loaded"
            finally:
                if self._state != "loaded":
                    self._state = "new"

    def _load_entry_points(self) -> None:
        for point in importlib.metadata.entry_points(group=f"inc_graph.{self.kind}"):
            try:
                obj = point.load()
            except Exception as error:  # a broken plugin must not take the library down with it
                text = f"{self.kind} plugin '{point.name}' ({point.value}) failed to load: {error!r}"
                warnings.warn(text, IncWarning, stacklevel=4)
                continue
            if not isinstance(obj, types.ModuleType):  # a module registers its contents itself
                self.add(point.name, obj, owner=f"entry point {point.value}")


def _import_package(package: str) -> None:
    module = importlib.import_module(package)
    for info in sorted(pkgutil.iter_modules(module.__path__), key=lambda info: info.name):
        if not info.name.startswith("_"):
            importlib.import_module(f"{package}.{info.name}")


def _import_file(file: Path) -> str:
    # The path's digest keeps files of one name in two folders apart, and makes the second load a lookup.
    name = f"inc_graph_ext_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    if name in sys.modules:
        return name
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise IncError(f"cannot import extension file {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before running it: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise IncError(f"extension file {file} failed to import: {error}") from error
    return name


def _owner_of(obj: Any) -> str:
    """Who registers ``obj``: its own qualified name for a class or function, else the module that called."""
    if isinstance(obj, (type, types.FunctionType)):
        return f"{obj.__module__}.{obj.__qualname__}"
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "?")) if frame is not None else "?"


PASSES: Registry[Any] = Registry("pass", "inc_graph.passes")
PATTERNS: Registry[Any] = Registry("pattern", "inc_graph.passes.patterns")
ALGORITHMS: Registry[Any] = Registry("algorithm", "inc_graph.passes.qparams")
BACKENDS: Registry[Any] = Registry("backend", "inc_graph.lowering")
QTYPES: Registry[Any] = Registry("qtype", None)
CONFIGS: Registry[Any] = Registry("config", "inc_graph.quantization.configs")
