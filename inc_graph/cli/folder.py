"""A saved folder as commands look at it: what is told without the weights first, graphs and tensors when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from inc_graph.errors import SavedModelError
from inc_graph.recipe import Recipe
from inc_graph.report import Report
from inc_graph.saving import read_graph
from inc_graph.saving.folder import check_files, read_json, read_manifest
from inc_graph.saving.model_files import SCOPES
from inc_graph.saving.tensors import TensorReader

__all__ = ["Folder"]


class Folder:
    """A saved model.

    Args:
        path: The folder.

    Raises:
        SavedModelError: it has no manifest that can be read, or is of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.content = read_manifest(path)
        self.scope = str(self.content.get("scope"))
        self.facts: dict[str, Any] = self._table("facts")
        self.producer: dict[str, Any] = self._table("producer")
        if self.scope not in SCOPES:
            raise SavedModelError(f"{path}: field 'scope' is {self.scope!r}, which this version does not read")

    def _table(self, name: str) -> dict[str, Any]:
        if not isinstance(found := self.content.get(name), dict):
            raise SavedModelError(f"{self.path}: field {name!r} of the manifest cannot be read")
        return found

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """File -> its size and hash, as the manifest says."""
        return self.content["files"]

    @property
    def recipe(self) -> Recipe | None:
        """What was asked for; None where methods of one's own did all."""
        found = self.facts.get("recipe", {})
        return None if found is None else Recipe.from_json(found)

    @property
    def report(self) -> Report:
        """What came of it."""
        return Report.from_json(self.facts.get("report"))

    @property
    def has_graphs(self) -> bool:
        """Whether it holds graphs of ours; what methods of one's own have made are tensors only."""
        return self.facts.get("recipe", {}) is not None

    def check(self, name: str | None = None) -> None:
        """Compare a file, or all of them, with the manifest. SavedModelError names the first that differs."""
        files = self.files if name is None else {name: self.files[name]}
        check_files(self.path, {"files": files})

    def body(self) -> dict[str, Any]:
        """What the graph file holds, compared with its hash. The tensors are not read for it."""
        found = [n for n in self.files if n.endswith(".json")]
        if len(found) != 1:
            raise SavedModelError(f"{self.path}: the manifest must name one graph, it has {len(found)}")
        self.check(found[0])
        body = read_json(self.path / found[0])
        needed = {"graph"} if self.scope == "graph" else {"layers", "state", "class"}
        if not isinstance(body, dict) or not needed <= set(body):
            raise SavedModelError(f"{self.path / found[0]}: the fields {', '.join(sorted(needed))} are not all there")
        return body

    def tensors(self) -> TensorReader:
        """The tensors, mapped from their files."""
        names = [n for n in self.files if n.endswith(".safetensors")]
        return TensorReader(self.path, names, torch.device("cpu"))

    def graphs(self, body: dict[str, Any] | None = None) -> Iterator[tuple[list[str], fx.GraphModule]]:
        """(paths, graph) of each quantized layer, or ([""], graph) of a whole model. Tensors are mapped."""
        body = body if body is not None else self.body()
        tensors, recipe = self.tensors(), self.recipe
        moved = None if self.facts.get("device") == "cpu" else torch.device("cpu")
        if self.scope == "graph":
            yield [""], read_graph(body["graph"], tensors, moved)
        for layer in () if self.scope == "graph" else body["layers"]:
            if not isinstance(layer, dict) or not {"paths", "graph", "facts"} <= set(layer):
                raise SavedModelError("the fields paths, graph and facts of a layer are not all there")
            paths = layer["paths"]
            if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
                raise SavedModelError("field 'paths' of an entry is not a list of names")
            try:
                gm = read_graph(layer["graph"], tensors, moved)
            except SavedModelError as e:
                raise SavedModelError(e.message, node=e.node, module=e.module or paths[0], hint=e.hint) from e
            if recipe is not None:
                gm.meta.setdefault("inc", {})["recipe"] = recipe.to_json()
            yield paths, gm
