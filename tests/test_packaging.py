"""What is installed: the package list, the wheel, the wheel in a clean environment, and the names it must not take."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import inc_graph

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"inc_graph": "inc_graph", "passes": "inc_graph.passes", "lowering": "inc_graph.lowering"}


def on_disk() -> dict[str, str]:
    """{package: folder relative to the root}, for each folder that holds Python files."""
    return {
        ".".join([package, *folder.relative_to(ROOT / top).parts]): folder.relative_to(ROOT).as_posix()
        for top, package in FOLDERS.items()
        for folder in sorted({file.parent for file in (ROOT / top).rglob("*.py")})
    }


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, so that no earlier build's left-overs get in and none are left."""
    target = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def wheel_modules(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}


def modules_on_disk() -> set[str]:
    return {
        f"{package.replace('.', '/')}/{file.name}"
        for package, folder in on_disk().items()
        for file in (ROOT / folder).glob("*.py")
    }


def test_package_list_equals_the_disk() -> None:
    tool = PYPROJECT["tool"]["setuptools"]
    assert sorted(tool["packages"]) == sorted(on_disk())
    assert tool["package-dir"] == on_disk()
    bare = [folder for folder in on_disk().values() if not (ROOT / folder / "__init__.py").exists()]
    assert not bare, f"__init__.py is missing in {bare}"


def test_version() -> None:
    assert PYPROJECT["project"]["version"] == inc_graph.__version__


def test_wheel_holds_all_modules_and_no_generic_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"inc_graph", f"inc_graph-{inc_graph.__version__}.dist-info"}
    assert wheel_modules(wheel) == modules_on_disk()
    assert "inc_graph/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path
    )
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path))
    # The dependencies come from here. A path file inside that folder (an editable inc_graph) is not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    code = """
import inc_graph, sys
assert "torch" not in sys.modules, "import inc_graph is cheap"
import inc_graph.lowering, inc_graph.passes, inc_graph.passes.patterns, inc_graph.passes.qparams
import importlib.util
assert importlib.util.find_spec("passes") is None and importlib.util.find_spec("lowering") is None
print(inc_graph.__file__, inc_graph.passes.__file__, inc_graph.lowering.__file__, sep="\\n")
"""
    files = run(python, "-I", "-c", code, cwd=tmp_path).splitlines()
    assert [Path(f).relative_to(site).as_posix() for f in files] == [
        "inc_graph/__init__.py",
        "inc_graph/passes/__init__.py",
        "inc_graph/lowering/__init__.py",
    ]


@pytest.mark.parametrize("name", ["passes", "lowering"])
def test_a_bare_import_refuses(name: str) -> None:
    code = f"try:\n    import {name}\nexcept ImportError as error:\n    print(error)"
    message = run(sys.executable, "-c", code, cwd=ROOT)
    assert re.search(rf"import inc_graph\.{name}\b", message), message


def test_source_distribution_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    assert wheel_modules(built) == modules_on_disk()
