"""The steps of `inc-graph load --check`. Each needs the one before it, so the first that fails is the last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from inc_graph.cli.examples import example_of_graph
from inc_graph.cli.folder import Folder
from inc_graph.cli.propagate import propagate
from inc_graph.cli.result import size
from inc_graph.errors import IncError
from inc_graph.graph import val
from inc_graph.quantization import load
from inc_graph.quantization.finish import assemble
from inc_graph.registry import BACKENDS
from inc_graph.utils.device import choose_backend, detect_device

__all__ = ["Step", "check_folder"]

# Signal to noise of a backend against the reference. Kernels round in other places, and deep models amplify that:
# MiniLM has 15 dB when all its tokens are one. Below this the output is another one.
_NEEDED_DB = 6.0


@dataclass
class Step:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


class _Failed(Exception):
    """A step found something."""


def check_folder(path: str, backend: str | None, device: str, call: bool) -> list[Step]:
    """What was looked at, up to the first step that failed.

    Args:
        path: A saved folder.
        backend, device: As for `load`.
        call: Also run it on random inputs.
    """
    steps: list[Step] = []
    check = _Check(path, backend, device)
    for name, work in check.steps(call):
        start = time.perf_counter()
        try:
            detail, ok = work(), True
        except (_Failed, IncError) as e:
            detail, ok = str(e), False
        steps.append(Step(name, ok, detail, time.perf_counter() - start))
        if not ok:
            break
    return steps


class _Check:
    """What the steps hand on to each other."""

    def __init__(self, path: str, backend: str | None, device: str) -> None:
        self.path, self.backend, self.device = path, backend, device
        self.folder: Folder
        self.body: dict[str, Any] = {}
        self.graphs: list[tuple[list[str], fx.GraphModule]] = []
        self.models: list[Any] = []

    def steps(self, call: bool) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "manifest", self.manifest
        yield "files", self.files
        yield "report and recipe", self.facts
        yield "graph", self.graph
        if self.folder.scope != "graph":
            yield "other tensors", self.state
        if not self.folder.has_graphs:  # methods of one's own are known to the code that has them only
            return
        yield "shapes and dtypes", self.values
        yield "kernels", self.kernels
        if call:
            yield "run", self.run

    def manifest(self) -> str:
        self.folder = Folder(self.path)
        producer = ", ".join(f"{name} {version}" for name, version in self.folder.producer.items())
        return f"scope {self.folder.scope}, written by {producer}"

    def files(self) -> str:
        self.folder.check()
        return f"{len(self.folder.files)} files, {size(sum(f['bytes'] for f in self.folder.files.values()))}"

    def facts(self) -> str:
        report, recipe = self.folder.report, self.folder.recipe
        rules = f"{len(recipe.rules)} rules" if recipe is not None else "methods of one's own"
        return f"{len(report.quantized)} operators quantized, {len(report.floats)} float; {rules}"

    def graph(self) -> str:
        self.body = self.folder.body()
        self.graphs = list(self.folder.graphs(self.body))
        return f"{len(self.graphs)} graphs with {sum(len(gm.graph.nodes) for _, gm in self.graphs)} nodes, verified"

    def state(self) -> str:
        """The tensors that are in no layer can be read. Whether they fit to the float model, only loading can tell."""
        tensors = self.folder.tensors()
        entries = self.body["state"]
        if not isinstance(entries, list) or not all(isinstance(e, dict) and e.get("paths") for e in entries):
            raise _Failed("field 'state' is not a list of tensors with paths")
        total = sum(tensors.get(str(entry["paths"][0]), entry).nbytes for entry in entries)
        return f"{len(entries)} tensors, {size(total)}"

    def values(self) -> str:
        same, undecided = 0, []
        for paths, gm in self.graphs:
            found = propagate(gm)
            if found.differences:
                node, what = found.differences[0]
                more = f" (and {len(found.differences) - 1} more)" if len(found.differences) > 1 else ""
                where = f" in layer {paths[0]}" if paths[0] else ""
                raise _Failed(f"node {node}{where}: {what}{more}")
            same += found.same
            undecided += found.undecided
        left = f"; {len(undecided)} cannot be known without data: {', '.join(undecided[:5])}" if undecided else ""
        return f"{same} values are those that their operators give{left}"

    def kernels(self) -> str:
        name, _ = choose_backend(self._backend(), detect_device(self.device).partition(":")[0])
        if self.folder.scope == "graph":
            self.models = [load(self.path, device=self.device, backend=self.backend)]
        else:
            for paths, gm in self.folder.graphs(self.body):  # read anew: a model takes its graph over
                try:
                    self.models.append(assemble(gm, name, self.folder.report.method, [], 0))
                except IncError as e:
                    raise _Failed(f"layer {paths[0]}: {e}") from e
        made = sum(len(m.report.kernels) for m in self.models)
        on_reference = sum(len(m.report.reference) for m in self.models)
        detail = f"{made} operators in kernels of {self.models[0].backend}, {on_reference} on the reference"
        return detail + ("; the float model was not needed for this" if self.folder.scope != "graph" else "")

    def _backend(self) -> str:
        """That asked for, or that saved for, or that of the device: as `load` does."""
        saved = str(self.folder.facts.get("backend"))
        can_run = saved in BACKENDS and BACKENDS.get(saved).available() is None
        return self.backend or (saved if can_run else "auto")

    def run(self) -> str:
        worst, count = math.inf, 0
        for model, (paths, gm) in zip(self.models, self.graphs, strict=True):
            where = f"layer {paths[0]}: " if paths[0] else ""
            try:
                args = example_of_graph(gm)
                args = pytree.tree_map(lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x, args)
                with torch.no_grad():
                    have = _tensors(model(*args[0], **args[1]))
                    want = _tensors(model.graph(*args[0], **args[1]))
            except IncError:
                raise
            except Exception as e:  # what the kernels say
                raise _Failed(f"{where}{type(e).__name__}: {str(e)[:300]}") from e
            _compare_with_stored(gm, have, where)
            for a, b in zip(have, want, strict=True):
                worst, count = min(worst, _signal_to_noise(a, b)), count + 1
            if worst < _NEEDED_DB:
                raise _Failed(f"{where}the backend is {worst:.0f} dB from the reference")
        shown = "equal to" if worst == math.inf else f"{worst:.0f} dB or more from"
        return f"{count} outputs on random inputs, {shown} those of the reference"


def _tensors(output: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]


def _compare_with_stored(gm: fx.GraphModule, have: list[torch.Tensor], where: str) -> None:
    """Rank, dtype and static sizes of the outputs are what the graph says, and no number is missing."""
    node = next(iter(reversed(gm.graph.nodes)))  # torch 2.8: reversed gives no iterator
    stored = [val(n) for n in pytree.tree_leaves(node.args) if isinstance(n, fx.Node)]
    stored = [v for v in stored if isinstance(v, torch.Tensor)]
    for number, (value, want) in enumerate(zip(have, stored, strict=False)):
        sizes = [w if isinstance(w, int) else h for w, h in zip(want.shape, value.shape, strict=False)]
        if value.dtype != want.dtype or value.ndim != want.ndim or list(value.shape) != sizes:
            what = f"is {value.dtype} {list(value.shape)}, stored is {want.dtype} {list(want.shape)}"
            raise _Failed(f"{where}output {number} {what}")
        if value.is_floating_point() and bool(value.isnan().any()):
            raise _Failed(f"{where}output {number} has values that are not a number")


def _signal_to_noise(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two outputs, in dB; infinite if they are equal."""
    x, y = a.detach().cpu().double(), b.detach().cpu().double()
    finite = x.isfinite() & y.isfinite()
    if not torch.equal(x[~finite], y[~finite]):
        return -math.inf
    noise = float((x - y)[finite].square().sum())
    signal = float(y[finite].square().sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
