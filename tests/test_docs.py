"""Every Python block of README.md and of the pages in docs/ runs, and prints what the page says it prints.

The blocks of one page share a namespace, from top to bottom. A ```text block right behind a ```python block is that
block's output; `...` in it stands for anything, and runs of blanks are equal. What else stands in a fence is a command
of the shell, of which targets and files are looked up, or listed in ILLUSTRATIONS. The pages that are made from the
code (`docs/generate`) are compared with it, and the site is built.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from inc_graph import registry
from inc_graph.algorithms import algos_mapping
from inc_graph.oppattern import register_pattern
from inc_graph.quantization import StaticQuantConfig, TuningConfig
from inc_graph.utils import choose_backend

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "generate"))
import docs_api  # noqa: E402
import docs_fields  # noqa: E402

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
MARKS = {"ipex.md": pytest.mark.ipex}  # `make test-ipex` runs the code of these
MADE = docs_fields.pages() | docs_api.pages()  # test_surface.py compares the page of docs_surface
WITHOUT_CODE = {"architecture.md", "measurements.md", "plan.md", "surface.md"}
ILLUSTRATIONS = {  # page -> how many blocks in it are neither code, output nor commands: formulas, layouts, schemas
    "architecture.md": 2,
    "from_scratch.md": 1,
    "ir.md": 5,
    "passes.md": 10,
    "writing_a_backend.md": 1,
}
NEEDS = {  # 8-bit kernels, or a package
    "from_scratch.md": "kernels",
    "mixed_precision.md": "kernels",
    "migrate_from_torchao.md": "torchao",
    "weight_only.md": "transformers",
}
REGISTRIES = (registry.PASSES, registry.PATTERNS, registry.ALGORITHMS, registry.BACKENDS, registry.QTYPES,
              registry.CONFIGS)  # fmt: skip

_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<text>.*?)^```$)?", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^(?P<mark> *```+)(?P<kind>[^\n]*)\n(?P<body>.*?)^ *```+$", re.MULTILINE | re.DOTALL)
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_LINK = re.compile(r"\[[^]]*\]\((?!https?://|#)([^)#\s]+)")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One block: its code, the line of the page that it starts on, the output that the page promises (None: any)."""

    code: str
    line: int
    output: str | None


def blocks(text: str) -> list[Block]:
    return [Block(m["code"], text.count("\n", 0, m.start("code")), m["text"]) for m in _BLOCK.finditer(text)]


@pytest.fixture
def untouched() -> Iterator[None]:
    """What a page registers or sets is gone after it."""
    before = [set(r.names()) for r in REGISTRIES]
    threads, grad, entries = torch.get_num_threads(), torch.is_grad_enabled(), dict(algos_mapping)
    yield
    algos_mapping.clear()
    algos_mapping.update(entries)
    for r, names in zip(REGISTRIES, before, strict=True):
        for name in set(r.names()) - names:
            r.remove(name)
    register_pattern(registry.PATTERNS.get("linear"))  # the lookup by target is made anew
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


def this_machine_prints_the_same() -> bool:
    """The pages show 8-bit activations on the inductor backend: not what every machine chooses."""
    what = StaticQuantConfig().op_quant()
    return choose_backend()[0] == "inductor" and what is not None and what.activation is not None and (
        what.activation.qtype == "uint8"
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("page", [pytest.param(p, marks=MARKS.get(p.name, ()), id=p.name) for p in PAGES])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
    need = NEEDS.get(page.name)
    if need == "kernels" and not this_machine_prints_the_same():
        pytest.skip("this page calls kernels that this machine does not have")
    if need in ("torchao", "transformers"):
        pytest.importorskip(need)
    assert found or page.name in WITHOUT_CODE, "a page without code: name it in WITHOUT_CODE"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    compare = this_machine_prints_the_same()
    for block in found:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            # empty lines in front: a traceback shows the line of the page
            exec(compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True), names)
        if block.output is not None and compare:
            same = doctest.OutputChecker().check_output(block.output, out.getvalue(), _FLAGS)
            assert same, f"{page.name}:{block.line}: promised\n{block.output}\nprinted\n{out.getvalue()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = {p.name for p in PAGES[1:]} - {"index.md"}
    assert pages | {"fields/index.md", "api/index.md"} == set(re.findall(r"\]\(([\w/]+\.md)\)", index))


def test_the_compiler_from_scratch_is_as_short_as_it_says() -> None:
    code = "".join(b.code for b in blocks((DOCS / "from_scratch.md").read_text(encoding="utf-8")))
    lines = [line for line in code.splitlines() if line.strip()]
    assert 150 < len(lines) < 205


# -------------------------------------------------------------------------------------------------- what does not run
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_runs_or_is_listed(page: Path) -> None:
    """No block escapes by its spelling: python runs, text is an output, sh is looked up, the rest is counted."""
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    assert all(m["mark"] == "```" and m["kind"] in ("python", "text", "sh", "") for m in found)
    kinds = [m["kind"] for m in found]
    assert kinds.count("python") == len(blocks(text))
    assert kinds.count("text") == sum(b.output is not None for b in blocks(text))
    assert kinds.count("") == ILLUSTRATIONS.get(page.name, 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_exist(page: Path) -> None:
    """Targets of make, modules after -m, and files of ours in the commands that a page shows."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in _FENCE.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] != "sh":
            continue
        code = re.sub(r"#.*", "", block["body"])
        assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets
        for module in re.findall(r"-m ((?:examples|benchmarks)\.\w+)", code):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_environment_variables_that_are_named_are_read() -> None:
    page = (DOCS / "migrate_from_neural_compressor.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+|LOGLEVEL)`", page.split("environment variables")[1].split("## ")[0]))
    source = "".join(
        p.read_text(encoding="utf-8") for folder in docs_api.FOLDERS.values() for p in folder.rglob("*.py")
    )
    assert len(named) > 5 and all(f'"{name}"' in source for name in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    for file, name in _TEST.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / file).exists(), file
        defined = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert not name or name in defined, f"{file}::{name}"


# --------------------------------------------------------------------------------------------- pages made from the code
@pytest.mark.parametrize("name", MADE)
def test_generated_pages_are_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == MADE[name], "run: python docs/generate"


def test_no_generated_page_is_left_over() -> None:
    there = {str(p.relative_to(DOCS)) for folder in ("fields", "api") for p in (DOCS / folder).rglob("*")}
    assert there == set(MADE)


def test_every_field_of_every_config_has_a_section() -> None:
    known = set()
    for name, kind in docs_fields.classes().items():
        page = MADE[f"fields/{name}.md"]
        table = docs_fields.fields_of(kind)
        assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(table) == list(kind._arguments())
        for field_name, field in table.items():
            assert len(field.doc) > 5 and field.doc.endswith("."), f"{name}.{field_name} does not say what it means"
            assert "object at 0x" not in page and f"Default: `{field.default!r}`" in page
            known.add(f"{name}.{field_name}")
    assert set(docs_fields.UPSTREAM) <= known


def test_every_field_of_the_tuning_config_is_described() -> None:
    docs = docs_fields.tuning_fields()
    assert set(docs) == {f.name for f in fields(TuningConfig)} and all(docs.values())
    titles = re.findall(r"^## (\w+)$", MADE["fields/TuningConfig.md"], re.MULTILINE)
    assert titles == [f.name for f in fields(TuningConfig)]


def test_a_page_says_whether_the_algorithm_is_there() -> None:
    for name, kind in docs_fields.classes().items():
        refused = "prepare` refuses it" in MADE[f"fields/{name}.md"]
        try:
            kind().recipe("eager", None)
        except NotImplementedError:
            assert refused, name
        else:
            assert not refused, name


def test_types_and_legal_values_come_from_the_checks() -> None:
    table = docs_fields.classes()["AutoRoundConfig"].fields
    assert docs_fields.type_of(table["bits"]) == "`int` or `None`"
    assert docs_fields.type_of(table["lr"]) == "`float` or `None`"
    assert docs_fields.type_of(table["device_map"]) == "anything"
    assert docs_fields.allowed(table["sampler"]) == "one of 'rand', 'sequential'"
    static = docs_fields.classes()["INT8StaticQuantConfig"].fields
    assert docs_fields.type_of(static["reduce_range"]) == "`bool` or `None`"
    assert docs_fields.allowed(static["act_algo"]).startswith("a range estimator of several batches (one of 'histogram")


def test_every_public_name_is_in_the_reference() -> None:
    entries = docs_api.shown()
    origins = {docs_api.origin(m, n) for m, names in entries.items() for n in names}
    for module, names in docs_api.public_modules().items():
        for name in names:
            home, _, own = docs_api.origin(module, name).rpartition(".")
            listed = {f"`{m}.{n}`" for m, n in ((module, name), (home, own)) if n in docs_api.unseen(m)}
            page = MADE[f"api/{docs_api._page_of(module)}.md"]
            assert any(n in page for n in listed) or f"{home}.{own}" in origins, f"{module}.{name}"


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    """Every name in the reference has an anchor there. (--quiet would hide the warnings that --strict refuses.)"""
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "CI": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    anchors: set[str] = set()
    for page in (tmp_path / "api").rglob("*.html"):
        anchors |= set(re.findall(r'id="([\w.]+)"', page.read_text(encoding="utf-8")))
    missing = [f"{m}.{n}" for m, names in docs_api.shown().items() for n in names if f"{m}.{n}" not in anchors]
    assert not missing


def test_blocks() -> None:
    text = "a\n```python\nx = 1\n```\n\n```text\n1\n```\n```sh\nls\n```\n```python\nprint(x)\n```\nb\n"
    assert blocks(text) == [Block("x = 1\n", 2, "1\n"), Block("print(x)\n", 12, None)]
