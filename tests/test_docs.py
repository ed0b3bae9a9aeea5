"""Every Python block of README.md and of the pages in docs/ runs, and prints what the page says it prints.

The blocks of one page share a namespace, from top to bottom. A ```text block right behind a ```python block is that
block's output; `...` in it stands for anything, and runs of blanks are equal.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from inc_graph import registry
from inc_graph.oppattern import register_pattern
from inc_graph.quantization import StaticQuantConfig
from inc_graph.utils import choose_backend

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_CODE = {"architecture.md", "measurements.md", "plan.md"}
REGISTRIES = (registry.PASSES, registry.PATTERNS, registry.ALGORITHMS, registry.BACKENDS, registry.QTYPES)

_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<text>.*?)^```$)?", re.MULTILINE | re.DOTALL)
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
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield
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
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
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
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {p.name for p in PAGES[1:]} - {"index.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_blocks() -> None:
    text = "a\n```python\nx = 1\n```\n\n```text\n1\n```\n```sh\nls\n```\n```python\nprint(x)\n```\nb\n"
    assert blocks(text) == [Block("x = 1\n", 2, "1\n"), Block("print(x)\n", 12, None)]
