"""Golden texts: expected output in a file under tests/golden, compared line by line.

Run the tests with UPDATE_GOLDEN=1 to write the files anew, then read the diff before keeping it.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name: str, text: str, folder: Path = GOLDEN) -> None:
    """AssertionError with a diff unless `text` is what the file `name` under `folder` holds."""
    file = folder / name
    text = text.rstrip("\n") + "\n"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return
    assert file.exists(), f"no golden file {file}; write it with UPDATE_GOLDEN=1"
    want = file.read_text(encoding="utf-8")
    if text != want:
        lines = difflib.unified_diff(want.splitlines(True), text.splitlines(True), f"golden/{name}", "this run")
        raise AssertionError("".join(lines) + "\nif this is what should be, run with UPDATE_GOLDEN=1")
