"""A saved model of each scope, made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_models
import pytest
import torch

from inc_graph.quantization import StaticQuantConfig, convert, prepare
from inc_graph.saving.folder import read_manifest, write_folder
from inc_graph.saving.tensors import file_hash


def quantized(example: Any, **how: Any) -> Any:
    torch.manual_seed(2)
    prepared = prepare(cli_models.net(), StaticQuantConfig(), example_inputs=example, **how)
    for call in cli_models.tensors():
        prepared(call)
    return convert(prepared)


@pytest.fixture(scope="session")
def _graph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph") / "model"
    batch = torch.export.Dim("batch")
    quantized((torch.randn(4, 16),), dynamic_shapes=({0: batch},)).save(folder)
    return folder


@pytest.fixture(scope="session")
def _module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module") / "model"
    quantized(None).save(folder)
    return folder


@pytest.fixture
def graph_folder(_graph_folder: Path, tmp_path: Path) -> Path:
    """A model that was exported, for any batch size."""
    return Path(shutil.copytree(_graph_folder, tmp_path / "graph_model"))


@pytest.fixture
def module_folder(_module_folder: Path, tmp_path: Path) -> Path:
    """A model that was quantized layer by layer."""
    return Path(shutil.copytree(_module_folder, tmp_path / "module_model"))


@pytest.fixture
def rewrite() -> Callable[[Path, Callable[[Any], None]], None]:
    """Change what the graph file of a folder says, with hashes that are right again."""

    def change(folder: Path, edit: Callable[[Any], None]) -> None:
        content = read_manifest(folder)
        (graph,) = (n for n in content["files"] if n.endswith(".json"))
        body = json.loads((folder / graph).read_text())
        edit(body)
        others = [n for n in content["files"] if n != graph]

        def fill(temporary: Path) -> tuple[dict[str, Any], dict[Path, str]]:
            changed = temporary / "graph-0123456789abcdef.json"
            changed.write_text(json.dumps(body))
            files = [*(Path(shutil.copy(folder / name, temporary / name)) for name in others), changed]
            return {k: v for k, v in content.items() if k != "files"}, {file: file_hash(file) for file in files}

        write_folder(folder, fill)

    return change
