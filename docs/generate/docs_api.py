"""`docs/api/`: the reference. The pages only name modules; mkdocstrings fills in their docstrings at build time.

Which modules there are is read from the disk: a module with an `__all__` is on a page, whatever it is called.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "inc_graph": ROOT / "inc_graph",
    "inc_graph.passes": ROOT / "passes",
    "inc_graph.lowering": ROOT / "lowering",
}

# page -> (title, introduction, packages or modules; a module goes to the first page that names it or its package)
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "quantization": ("inc_graph.quantization", "What most programs need.", ("inc_graph.quantization",)),
    "export": ("inc_graph.export", "From a model to its graph.", ("inc_graph.export",)),
    "common": ("inc_graph.common", "Options of a process and logging.", ("inc_graph.common",)),
    "utils": ("inc_graph.utils", "Devices, modules by name, what is installed.", ("inc_graph.utils",)),
    "algorithms": ("inc_graph.algorithms", "Methods of your own.", ("inc_graph.algorithms",)),
    "saving": ("inc_graph.saving", "The folder of a saved model.", ("inc_graph.saving",)),
    "cli": ("inc_graph.cli", "The command line.", ("inc_graph.cli",)),
    "passes": ("inc_graph.passes", "Passes, operator patterns and range estimators.", ("inc_graph.passes",)),
    "lowering": ("inc_graph.lowering", "Backends.", ("inc_graph.lowering",)),
    "core": ("The core", "Graphs, number formats, passes, registries, errors: what extensions build on.",
             ("inc_graph",)),
}  # fmt: skip


def exported(path: Path) -> list[str]:
    """The names in a module's `__all__`, read without importing it; [] if it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


@functools.cache
def public_modules() -> dict[str, list[str]]:
    """Module -> its public names, of every module that has any and whose name is not private."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(p for p in parts if p != "__init__")
            if not any(p.startswith("_") for p in name.split(".")) and (names := exported(path)):
                found[name] = names
    return found


def _page_of(module: str) -> str:
    return next(p for p, (_, _, roots) in PAGES.items() if any(f"{module}.".startswith(f"{r}.") for r in roots))


def _path(module: str) -> Path:
    package = max((p for p in FOLDERS if f"{module}.".startswith(f"{p}.")), key=len)
    folder = FOLDERS[package].joinpath(*module.removeprefix(package).strip(".").split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


@functools.cache
def _imports(module: str) -> dict[str, tuple[str, str]]:
    """Name in a module -> (module of ours, name there) that it is imported from."""
    found = {}
    for node in ast.walk(ast.parse(_path(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("inc_graph"):
            found |= {a.asname or a.name: (node.module, a.name) for a in node.names}
    return found


@functools.cache
def unseen(module: str) -> list[str]:
    """Public names that a tool that reads files does not see: made by the module's `__getattr__`, or unpacked."""
    if module not in public_modules():
        return []
    bound = set(_imports(module))
    for node in ast.walk(ast.parse(_path(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom | ast.Import):
            bound |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound |= {t.id for t in targets if isinstance(t, ast.Name)}
    return [name for name in public_modules()[module] if name not in bound]


def origin(module: str, name: str) -> str:
    """The full name of what `name` is in a module, where it is defined."""
    source = _imports(module).get(name)
    return origin(*source) if source and _path(source[0]).exists() else f"{module}.{name}"


def shown() -> dict[str, list[str]]:
    """Module -> the names of its entry. A name stands where it is defined, or under the package that offers it."""
    public = public_modules()
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for module in sorted(public, key=lambda m: (_path(m).name != "__init__.py", m)):
        for name in public[module]:
            whole = origin(module, name)
            home, _, own = whole.rpartition(".")
            if own in public.get(home, ()) and home != module:  # shown there, unless this is its package
                offered = _path(module).name == "__init__.py"
                if not offered or home.rpartition(".")[2] in public[module]:  # a name that hides its module
                    continue
            if whole not in seen and name not in unseen(module) and own not in unseen(home):
                seen.add(whole)
                found.setdefault(module, []).append(name)
    return found


def pages() -> dict[str, str]:
    """File in docs/ -> its text."""
    by_page: dict[str, list[str]] = {}
    entries = shown()
    for module in entries:
        by_page.setdefault(_page_of(module), []).append(module)
    texts, index = {}, []
    for page in (p for p in PAGES if p in by_page):
        title, introduction, roots = PAGES[page]
        body = ""
        for module in sorted(by_page[page], key=lambda m: (m not in roots, m)):
            members = "".join(f"        - {name}\n" for name in entries[module])
            body += f"\n::: {module}\n    options:\n      members:\n{members}"
            if names := unseen(module):
                body += f"\nBesides, as the module says: {', '.join(f'`{module}.{n}`' for n in names)}.\n"
        texts[f"api/{page}.md"] = f"# {title}\n\n{introduction}\n{body}"
        index.append(f"* [{title}]({page}.md): {introduction}\n")
    head = (
        "# Reference\n\nEvery public name, from its docstring. What a package offers stands under the package, wherever"
        " it is defined.\nThese pages are written by `python docs/generate`, and filled in when the site is built.\n\n"
    )
    return {"api/index.md": head + "".join(index), **texts}
