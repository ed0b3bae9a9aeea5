"""The folder of a saved model.

    inc_graph.json                       what is here: format version, who wrote it, each file with its size and sha256
    graph-<hash>.json                    graphs, recipe and all else that is no tensor
    model-<hash>[-i-of-n].safetensors    tensors

Files are named after their contents and never written twice; `inc_graph.json` is replaced in one step, as the last. So
a folder holds the old model or the new one at every moment, whatever happens to the writer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inc_graph.errors import SavedModelError
from inc_graph.saving.tensors import file_hash

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "check_files",
    "is_saved_model",
    "read_json",
    "read_manifest",
    "reading",
    "write_folder",
]

FORMAT = "inc_graph"
VERSION = 1
MANIFEST = "inc_graph.json"
_OURS = re.compile(r"(graph-[0-9a-f]{16}\.json|model-[0-9a-f]{16}(-\d{5}-of-\d{5})?\.safetensors)")
_TEMPORARY = ".saving-inc-"
_MANIFEST_LIMIT = 1 << 26  # bytes


def is_saved_model(path: str | os.PathLike[str]) -> bool:
    """Whether there is a manifest in this folder."""
    return (Path(path) / MANIFEST).is_file()


# -------------------------------------------------------------------------------------------------------------- write
def write_folder(path: str | os.PathLike[str], fill: Callable[[Path], tuple[dict[str, Any], dict[Path, str]]]) -> Path:
    """Write a saved model; what is there already stays valid until the last moment, and goes then.

    Args:
        path: The folder; made if it is not there. Files in it that are not of a saved model are left alone.
        fill: Gets an empty folder, writes files into it, and gives the contents of the manifest, and the sha256 of each
            of those files.

    Raises:
        SavedModelError: the folder cannot be written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder), contextlib.ExitStack() as stack:
            for left in folder.glob(f"{_TEMPORARY}*"):  # of a writer that was killed: nobody else holds the lock
                if re.fullmatch(re.escape(_TEMPORARY) + r"\w{8}", left.name):
                    shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            content, files = fill(temporary)
            content["files"] = {f.name: {"bytes": f.stat().st_size, "sha256": digest} for f, digest in files.items()}
            text = _dump({"format": FORMAT, "version": VERSION, "sha256": _digest(content), "content": content})
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
            for file in [*files, temporary / MANIFEST]:
                shutil.copymode(temporary / MANIFEST, file)  # safetensors writes for the user alone
                _sync(file)
            for file in files:
                os.replace(file, folder / file.name)
            _sync(folder)
            os.replace(temporary / MANIFEST, folder / MANIFEST)
            _sync(folder)
            for old in folder.iterdir():
                if _OURS.fullmatch(old.name) and old.name not in content["files"]:
                    with contextlib.suppress(OSError):  # the new model is there; the next writer tries again
                        old.unlink()
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        hint = "what was saved there before is as it was"
        raise SavedModelError(f"cannot save to {folder}: {getattr(e, 'strerror', None) or e}", hint=hint) from e
    return folder


@contextlib.contextmanager
def _locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """One writer at a time, and no reader beside it, where the system has such a lock."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError, ValueError):  # another system; a folder that is not there, or not ours
        yield
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems have none
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def reading(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """In the block no writer replaces the model in this folder: files are opened when their tensors are read."""
    return _locked(Path(path), shared=True)


def _sync(path: Path) -> None:
    """Have the system write it to the disk: a name must not get there before the contents do."""
    with contextlib.suppress(PermissionError):  # folders, on some systems
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _dump(data: Any) -> str:
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- read
def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of the manifest, checked; not yet the files.

    Raises:
        SavedModelError: there is none, it is damaged, or of a newer version.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise SavedModelError(f"{path} is not a saved model: it has no {MANIFEST}", hint=_foreign(Path(path)))
    if file.stat().st_size > _MANIFEST_LIMIT:
        raise SavedModelError(f"{file} is too large to be a manifest")
    data = read_json(file)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SavedModelError(f"{file}: field 'format' is not {FORMAT!r}")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SavedModelError(f"{file}: field 'version' is {str(version)[:40]!r}")
    if version > VERSION:
        producer = data["content"].get("producer") if isinstance(data.get("content"), dict) else None
        by = str(producer.get("inc_graph", "?"))[:20] if isinstance(producer, dict) else "?"
        hint = f"it was written by inc_graph {by}: install that version or a newer one"
        raise SavedModelError(f"{file} has format version {version}, this version reads up to {VERSION}", hint=hint)
    content = data.get("content")
    if not isinstance(content, dict) or set(data) != {"format", "version", "sha256", "content"}:
        raise SavedModelError(f"{file}: field 'content' is missing, or there are others")
    if data["sha256"] != _digest(content):
        raise SavedModelError(f"{file} is damaged: field 'sha256' is not that of its content")
    files = content.get("files")
    if not isinstance(files, dict) or not all(_OURS.fullmatch(name) for name in files):
        raise SavedModelError(f"{file}: field 'files' has a name that is not one of a saved model's")
    for name, facts in files.items():
        if not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"}:
            raise SavedModelError(f"{file}: field 'files', {name}: its size or hash is missing")
    return content


def check_files(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Read all files and compare them with what the manifest says. SavedModelError names the first that differs."""
    for name, facts in content["files"].items():
        file = Path(path) / name
        if not file.is_file():
            raise SavedModelError(f"{file} is missing")
        if file.stat().st_size != facts["bytes"]:
            raise SavedModelError(f"{file} has {file.stat().st_size} bytes, saved were {str(facts['bytes'])[:30]}")
        if file_hash(file) != facts["sha256"]:
            raise SavedModelError(f"{file} is damaged: its sha256 is another one")


def read_json(file: Path) -> Any:
    """What a JSON file holds. SavedModelError if it cannot be read as such."""
    try:
        text = file.read_bytes().decode("utf-8")
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once)
    except OSError as e:
        raise SavedModelError(f"{file} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise SavedModelError(f"{file} is damaged: {str(e)[:120]}") from e


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _foreign(path: Path) -> str:
    if not path.exists():
        return "there is no such folder"
    if path.is_file():
        return "give the folder that save() wrote"
    if (path / "qconfig.json").exists() and (path / "quantized_weight.pt").exists():
        return f"it was saved by neural_compressor: `inc-graph import-inc {path} NEW_FOLDER` makes one of it"
    return "give the folder that save() wrote"
