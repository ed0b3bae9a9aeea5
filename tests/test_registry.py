"""The registry: lookup, duplicates, lazy discovery of packages, folders and entry points."""

from __future__ import annotations

import importlib.metadata
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from inc_graph.errors import IncError, IncWarning, UnknownNameError
from inc_graph.registry import QTYPES, Registry


def test_add_get_names_items() -> None:
    registry: Registry[int] = Registry("thing")
    assert registry.add("b", 2) == 2
    registry.add("a", 1)
    assert registry.names() == ["a", "b"]
    assert registry.items() == [("a", 1), ("b", 2)]
    assert "a" in registry and "c" not in registry
    registry.remove("a")
    assert registry.names() == ["b"]


def test_decorator_returns_the_object() -> None:
    registry: Registry[Any] = Registry("thing")

    @registry.register("f")
    def f() -> int:
        return 1

    assert f() == 1 and registry.get("f") is f


def test_unknown_name_suggests_and_lists() -> None:
    registry: Registry[int] = Registry("backend")
    registry.add("inductor", 1)
    registry.add("eager", 2)
    with pytest.raises(UnknownNameError) as error:
        registry.get("inductr")
    assert str(error.value) == "unknown backend 'inductr'; did you mean 'inductor'?\n  hint: known: eager, inductor"
    with pytest.raises(KeyError, match="none"):
        Registry("empty").get("x")
    with pytest.raises(UnknownNameError):
        registry.remove("x")
    with pytest.raises(UnknownNameError, match=r"unknown backend \['eager'\]"):
        registry.get(["eager"])  # type: ignore[arg-type]


def test_duplicates_name_both_owners() -> None:
    registry: Registry[Any] = Registry("thing")

    def first() -> None: ...

    def second() -> None: ...

    registry.add("x", first)
    registry.add("x", first)
    with pytest.raises(IncError, match=r"'x' is registered twice: by .*first and by .*second"):
        registry.add("x", second)
    assert registry.get("x") is first
    registry.add("y", 1)
    with pytest.raises(IncError, match=rf"by {__name__} and by {__name__}"):
        registry.add("y", 2)


@pytest.mark.parametrize("name", ["", None, 3])
def test_bad_names(name: Any) -> None:
    with pytest.raises(IncError, match="non-empty string"):
        Registry[int]("thing").add(name, 1)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with two plug-in modules; the registry they fill stands in the package itself."""
    name = f"plugins_{tmp_path.name}".replace("-", "_")
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text(
        f"from inc_graph.registry import Registry\nTABLE = Registry('thing', {name!r})\n"
    )
    (folder / "one.py").write_text(f"from {name} import TABLE\nTABLE.add('one', 1)\nTABLE.names()\n")
    (folder / "two.py").write_text(f"from {name} import TABLE\nTABLE.add('two', 2)\n")
    (folder / "_private.py").write_text("raise RuntimeError('never imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_package_is_imported_on_first_use(package: str) -> None:
    table = __import__(package).TABLE
    assert f"{package}.one" not in sys.modules
    assert table.names() == ["one", "two"]
    assert f"{package}._private" not in sys.modules


def test_failing_module_fails_every_time(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "broken.py").write_text("1 / 0\n")
    table = __import__(package).TABLE
    for _ in range(2):  # a second look must not find a half-filled table and go on
        with pytest.raises(ZeroDivisionError):
            table.names()


def test_load_folder(tmp_path: Path) -> None:
    registry: Registry[Any] = Registry("thing")
    sys.modules["_registry_under_test"] = registry  # type: ignore[assignment]
    code = textwrap.dedent(
        """
        from __future__ import annotations
        import sys
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Thing:
            x: int

        sys.modules["_registry_under_test"].add("mine", Thing(1))
        """
    )
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "_skip.py").write_text("1 / 0")
    try:
        names = registry.load_folder(tmp_path)
        assert len(names) == 1 and names == registry.load_folder(str(tmp_path))
        assert registry.get("mine").x == 1
        (tmp_path / "bad.py").write_text("1 / 0")
        for _ in range(2):
            with pytest.raises(IncError, match=r"bad\.py failed to import: division by zero"):
                registry.load_folder(tmp_path)
        with pytest.raises(IncError, match="no such folder"):
            registry.load_folder(tmp_path / "nowhere")
    finally:
        del sys.modules["_registry_under_test"]


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str, obj: Any) -> None:
            self.name, self.value, self.obj = name, f"dist:{name}", obj

        def load(self) -> Any:
            if isinstance(self.obj, Exception):
                raise self.obj
            return self.obj

    def entry_points(group: str) -> list[Point]:
        return [Point("good", 7), Point("bad", ImportError("gone"))] if group == "inc_graph.thing" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    registry: Registry[int] = Registry("thing")
    with pytest.warns(IncWarning, match=r"thing plugin 'bad' \(dist:bad\) failed to load"):
        assert registry.names() == ["good"]
    with pytest.raises(IncError, match="entry point dist:good"):
        registry.add("good", 8)


def test_qtypes_table_is_filled_on_import() -> None:
    import inc_graph.qtypes  # noqa: F401

    assert "int8" in QTYPES and "Registry('qtype'" in repr(QTYPES)
