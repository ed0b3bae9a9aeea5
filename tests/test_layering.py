"""Imports point down only: the floors are read from docs/architecture.md, the imports from the syntax tree.

Every import counts, also one inside a function or under TYPE_CHECKING. On one floor modules may use each other as long
as no cycle comes of it. What a layer finds by name in a registry is not an import: so F6 reaches passes and lowerings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"inc_graph": "inc_graph", "passes": "inc_graph.passes", "lowering": "inc_graph.lowering"}
TOP = {"passes": 5, "lowering": 4}  # highest floor that each of the two may import


def read_floors(text: str) -> dict[str, int]:
    """{'errors': 0, 'qtypes': 1, ...} from the rows ``| F0 | `errors` `registry` | ... |``."""
    rows = re.findall(r"^\|\s*F(\d)\s*\|([^|]*)\|", text, re.MULTILINE)
    return {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)`", names)}


FLOORS = read_floors((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def modules() -> dict[str, Path]:
    """{dotted module name: file} of everything that is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = file
    return found


MODULES = modules()


def imports(module: str, is_package: bool, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of each thing imported; ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base]) if base else ".".join(parts)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def own(name: str, known: dict[str, Path]) -> str | None:
    """The longest prefix of ``name`` that is a module of ours."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def layer(module: str) -> str:
    """'' for inc_graph itself, else the first name below it: a floor's module, 'passes' or 'lowering'."""
    return [*module.split("."), ""][1]


def fault(importer: str, imported: str) -> str | None:
    """Why ``importer`` may not import ``imported``; None if it may."""
    source, target = layer(importer), layer(imported)
    if target == "":  # the package itself: a version and no code
        return None
    if source == "":
        return "inc_graph/__init__.py stays free of imports"
    if source in TOP:
        if target in TOP:
            return None if source == target else f"{source} may not import {target}"
        limit = TOP[source]
    else:
        if target in TOP:
            return f"only the registry reaches {target}"
        limit = FLOORS[source]
    return None if FLOORS[target] <= limit else f"F{FLOORS[target]} is above F{limit}"


def edges(tree_of: dict[str, Path]) -> Iterator[tuple[str, str, int]]:
    for module, file in tree_of.items():
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for name, line in imports(module, file.name == "__init__.py", tree):
            target = own(name, tree_of)
            if target is not None and target != module:
                yield module, target, line


def test_every_module_has_a_floor() -> None:
    assert set(FLOORS) and set(FLOORS.values()) == set(range(7))
    homeless = {m for m in MODULES if layer(m) not in {"", *TOP, *FLOORS}}
    assert not homeless, f"assign a floor in docs/architecture.md to {sorted(homeless)}"


def test_imports_point_down() -> None:
    faults = [
        f"{MODULES[importer].relative_to(ROOT)}:{line}: imports {imported}: {why}"
        for importer, imported, line in edges(MODULES)
        if layer(importer) in {"", *TOP, *FLOORS} and layer(imported) in {"", *TOP, *FLOORS}
        if (why := fault(importer, imported))
    ]
    assert not faults, "\n".join(faults)


def test_no_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for importer, imported, _ in edges(MODULES):
        if not importer.startswith(f"{imported}."):  # a package's __init__ is always loaded before its modules
            graph[importer].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_algorithms_know_tensors_only() -> None:
    """passes/qparams/ uses F0..F2, the estimators' base class and each other; never a graph."""
    faults = []
    for module, file in MODULES.items():
        if not module.startswith("inc_graph.passes.qparams."):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for name, line in imports(module, False, tree):
            target = own(name, MODULES)
            if name.split(".")[:2] == ["torch", "fx"]:
                faults.append(f"{file.relative_to(ROOT)}:{line}: imports {name}")
            elif target and not (
                target.startswith("inc_graph.passes.qparams")
                or layer(target) == "calibrate"
                or FLOORS.get(layer(target), 9) <= 2
            ):
                faults.append(f"{file.relative_to(ROOT)}:{line}: imports {target}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("importer", "source", "expected"),
    [
        ("inc_graph.spec", "import inc_graph.errors, torch", None),
        ("inc_graph.spec", "from . import qtypes", None),
        ("inc_graph.spec", "from .ops import quantize", "F3 is above F1"),
        ("inc_graph.errors", "def f():\n    import inc_graph.spec", "F1 is above F0"),
        ("inc_graph.passes.fold", "from inc_graph import recipe", None),
        ("inc_graph.passes.fold", "from ..quantization import convert", "F6 is above F5"),
        ("inc_graph.passes.fold", "from ..lowering import eager", "passes may not import lowering"),
        ("inc_graph.passes.patterns.conv", "from .. import fold", None),
        ("inc_graph.lowering.eager", "from ..passes.fold import Fold", "lowering may not import passes"),
        ("inc_graph.lowering.eager", "from inc_graph.passmanager import Pass", "F5 is above F4"),
        ("inc_graph.quantization", "from .passes import fold", "only the registry reaches passes"),
        ("inc_graph", "from .quantization import convert", "inc_graph/__init__.py stays free of imports"),
    ],
)
def test_the_rules_themselves(importer: str, source: str, expected: str | None) -> None:
    names = [
        "",
        *(f".{n}" for n in FLOORS),
        ".passes",
        ".passes.fold",
        ".passes.patterns",
        ".lowering",
        ".lowering.eager",
    ]
    known = {f"inc_graph{name}": Path() for name in names}
    found = [
        fault(importer, target)
        for name, _ in imports(importer, importer == "inc_graph", ast.parse(source))
        if (target := own(name, known))
    ]
    assert found == [expected]
