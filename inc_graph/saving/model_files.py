"""One saved model: graphs and facts in JSON, tensors beside it; all of it checked before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import inc_graph
from inc_graph.errors import SavedModelError
from inc_graph.saving.folder import check_files, read_json, read_manifest, write_folder
from inc_graph.saving.tensors import TensorReader, TensorWriter

__all__ = ["SCOPES", "SavedModel", "read_model", "shard_size", "write_model"]

SCOPES = ("graph", "module", "algorithm")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def shard_size(value: Any) -> int:
    """Bytes of 10_000, "500MB" or "2GiB". SavedModelError for anything else."""
    text = str(value).strip().upper()
    for unit, factor in _UNITS.items():
        number = text.removesuffix(unit)
        if number != text and number.strip().isdigit() and int(number) > 0:
            return int(number) * factor
    if text.isdigit() and int(text) > 0 and not isinstance(value, bool):
        return int(text)
    raise SavedModelError(f"max_shard_size must be a number of bytes, or such as '2GB', not {value!r}")


def write_model(
    path: str | os.PathLike[str],
    scope: str,
    facts: dict[str, Any],
    body: Callable[[TensorWriter], dict[str, Any]],
    max_shard_size: int | str = "2GB",
) -> Path:
    """Save a model in a folder.

    Args:
        path: The folder.
        scope: One of `SCOPES`.
        facts: What is told without reading the rest: method, backend, report, ...
        body: Gives the rest as JSON, and its tensors to the writer.
        max_shard_size: Of a file of tensors; one tensor is never cut.

    Raises:
        SavedModelError: a part has no form in a file, or the folder cannot be written. What was saved there is as it
            was then.
    """
    limit = shard_size(max_shard_size)
    tensors = TensorWriter()
    text = json.dumps(body(tensors), allow_nan=False, separators=(",", ":")).encode()

    def fill(folder: Path) -> tuple[dict[str, Any], dict[Path, str]]:
        digest = hashlib.sha256(text).hexdigest()
        graph = folder / f"graph-{digest[:16]}.json"
        graph.write_bytes(text)
        producer = {"inc_graph": inc_graph.__version__, "torch": torch.__version__, "python": platform.python_version()}
        return {"scope": scope, "producer": producer, "facts": facts}, {graph: digest, **tensors.write(folder, limit)}

    return write_folder(path, fill)


@dataclass
class SavedModel:
    """What a folder holds. `body` and `tensors` have been compared with their hashes, and not been interpreted."""

    path: Path
    scope: str
    producer: dict[str, Any]
    facts: dict[str, Any]
    body: Any
    tensors: TensorReader


def read_model(path: str | os.PathLike[str], device: torch.device) -> SavedModel:
    """Open a saved model.

    Args:
        path: The folder.
        device: Where its tensors will go.

    Raises:
        SavedModelError: it is not one, damaged, or of a newer version; names the file and the field.
    """
    content = read_manifest(path)
    if content.get("scope") not in SCOPES or not all(isinstance(content.get(k), dict) for k in ("producer", "facts")):
        raise SavedModelError(f"{path}: field 'scope', 'producer' or 'facts' of the manifest cannot be read")
    check_files(path, content)
    graphs = [n for n in content["files"] if n.endswith(".json")]
    if len(graphs) != 1:
        raise SavedModelError(f"{path}: field 'files' of the manifest must have one graph, it has {len(graphs)}")
    folder = Path(path)
    body = read_json(folder / graphs[0])
    tensors = TensorReader(folder, [n for n in content["files"] if n not in graphs], device)
    return SavedModel(folder, content["scope"], content["producer"], content["facts"], body, tensors)
