"""JSON files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from inc_graph.errors import IncError

__all__ = ["read_json_file", "write_json_file", "write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. OSError or ValueError if it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_json_file(file_path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. IncError, which names the file, if it cannot be read or is not JSON."""
    try:
        return json.loads(Path(file_path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise IncError(f"{os.fspath(file_path)} cannot be read as JSON: {e}") from e


def write_json_file(file_path: str | os.PathLike[str], data: Any) -> None:
    """Write a JSON file, whole or not at all. IncError, which names the file, if `data` is not what JSON can say."""
    path = Path(file_path)
    try:
        text = json.dumps(data, indent=4)
    except (TypeError, ValueError) as e:
        raise IncError(f"{path} is not written: {e}") from e
    write_whole(path, text)
