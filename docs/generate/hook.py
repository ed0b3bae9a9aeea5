"""mkdocs hook: puts the generated pages into the navigation, and lets mkdocstrings find the sources.

`passes/` and `lowering/` stand beside `inc_graph/` and install inside it; the tool reads files, so it gets a copy in
which they are where imports look for them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_ROOT = Path(__file__).resolve().parents[2]
_made: list[str] = []


@event_priority(100)  # mkdocstrings reads its paths in its own on_config
def on_config(config: Any) -> Any:
    folder = Path(tempfile.mkdtemp(prefix="inc_graph_docs_"))
    _made.append(str(folder))
    for source, target in (
        ("inc_graph", "inc_graph"),
        ("passes", "inc_graph/passes"),
        ("lowering", "inc_graph/lowering"),
    ):
        shutil.copytree(_ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
    for title, name in (("Fields of the configs", "fields"), ("Reference", "api")):
        pages = sorted(p.stem for p in (_ROOT / "docs" / name).glob("*.md") if p.stem != "index")
        config.nav.append({title: [f"{name}/index.md", *(f"{name}/{p}.md" for p in pages)]})
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    return config


def on_shutdown() -> None:
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)
