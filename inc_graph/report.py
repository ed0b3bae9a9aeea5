"""What became of a model: an object that prints as a table.

Every operator of the model that computes is in one of three lists: in a quantized kernel, quantized but on the
reference implementation, or float with the reason. Nothing is left out in silence. What has no line of its own:

    activation functions    in the kernel of the layer before them, or computed with it on the reference
    moves of data           on codes; or views, which cost nothing; or what moves constants, masks and positions. A move
                            that copies float data (cat, flip, gather, max_pool) has a line
    integers                what gives integers or booleans, or makes floats of nothing else
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx, nn

from inc_graph.errors import ConfigError
from inc_graph.graph import get_attr, module_path, peek_meta
from inc_graph.oppattern import OpPattern, pattern_of
from inc_graph.smooth_report import Smoothed
from inc_graph.tables import printed
from inc_graph.weight_report import WeightLine, Weights

__all__ = ["OpLine", "Report", "attribute_bytes", "read_graph", "type_of", "with_activations"]


@dataclass(frozen=True)
class OpLine:
    """One operator: graph name, module path, operator type, and what runs it or why it is float."""

    name: str
    module: str
    op: str
    detail: str = ""


@dataclass
class Report:
    """Result of `convert`.

    Attributes:
        method, backend: What was asked for and what it was lowered to.
        kernels: Operators that run in quantized kernels; `detail` names the kernel.
        reference: Quantized operators without a kernel: they compute in float between quantize and dequantize.
        floats: Operators that stayed float; `detail` is the reason.
        bytes_before, bytes_after: Bytes of all parameters and buffers the model reads.
        timings: (pass, seconds).
        weights: What became of each weight that a weight algorithm has quantized; print it.
        recipe: For every operator which rule gave it which method (`quantization.decisions`); print it.
        smoothing: What smoothing did to each input of layers; print it.
    """

    method: str = ""
    backend: str = ""
    kernels: list[OpLine] = field(default_factory=list)
    reference: list[OpLine] = field(default_factory=list)
    floats: list[OpLine] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    timings: list[tuple[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weights: Weights = field(default_factory=Weights)

    def __post_init__(self) -> None:
        self.recipe: Any = None  # read from the graph, which is saved: no field, so no part of the saved report
        self.smoothing = Smoothed()  # so is this

    @property
    def quantized(self) -> list[OpLine]:
        """All quantized operators, with a kernel or without."""
        return self.kernels + self.reference

    def count(self, op: str) -> int:
        """How many operators of a type run in quantized kernels."""
        return sum(line.op == op for line in self.kernels)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """Inverse of `to_json`. ConfigError that names the field if the data is not of that form."""
        names = {f.name: f for f in fields(cls)}
        data = {"weights": [], **data} if isinstance(data, dict) else data  # reports had none at first
        if not isinstance(data, dict) or set(data) != set(names):
            raise ConfigError(f"a report has the fields {sorted(names)}")
        report = cls(**data)
        for name in ("kernels", "reference", "floats"):
            setattr(report, name, [_line(name, x) for x in _listed(name, data[name])])
        report.timings = [_timing(x) for x in _listed("timings", data["timings"])]
        _listed("notes", data["notes"])
        report.weights = Weights(WeightLine.from_json(x) for x in _listed("weights", data["weights"]))
        for name, kind in (("method", str), ("backend", str), ("bytes_before", int), ("bytes_after", int)):
            if not isinstance(data[name], kind):
                raise ConfigError(f"Report.{name} cannot be {data[name]!r}"[:120])
        return report

    def __str__(self) -> str:
        return printed(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        share = f"{self.bytes_after / self.bytes_before:.3f} x" if self.bytes_before else "-"
        table = Table(title=f"{self.method} on {self.backend}", title_justify="left")
        table.add_column("operators")
        table.add_column("count", justify="right")
        table.add_column("what happened")
        for kind, count in Counter((x.op, x.detail) for x in self.kernels).items():
            table.add_row(kind[0], str(count), f"[green]{kind[1]}")
        for kind, count in Counter((x.op, x.detail) for x in self.reference).items():
            table.add_row(kind[0], str(count), f"[yellow]quantized, on the reference: {kind[1]}")
        for (op, reason), lines in _grouped(self.floats).items():
            names = ", ".join(dict.fromkeys(x.module or x.name for x in lines[:3]))
            more = ", ..." if len(lines) > 3 else ""
            table.add_row(op, str(len(lines)), f"float: {reason} [dim]({names}{more})")
        table.add_section()
        if errors := sorted((x.error, x.name) for x in self.weights if x.error is not None):
            mean, (worst, name) = sum(e for e, _ in errors) / len(errors), errors[-1]
            table.add_row("error", f"{mean:.4f}", f"mean of {len(errors)} weights, at most {worst:.4f} ({name})")
        if self.smoothing:
            parts = [f"{n} {by}" for by in ("absorbed", "multiplied", "left") if (n := self.smoothing.count(by))]
            table.add_row("smoothed", str(len(self.smoothing)), f"inputs of layers: {', '.join(parts)}")
        table.add_row("bytes", f"{self.bytes_after:,}", f"{share} of {self.bytes_before:,}")
        return Group(table, *(f"note: {n}" for n in self.notes))


def _listed(name: str, data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise ConfigError(f"Report.{name} must be a list")
    return data


def _line(name: str, data: Any) -> OpLine:
    keys = [f.name for f in fields(OpLine)]
    if not isinstance(data, dict) or set(data) != set(keys) or not all(isinstance(v, str) for v in data.values()):
        raise ConfigError(f"Report.{name}: a line has the texts {keys}")
    return OpLine(**data)


def _timing(data: Any) -> tuple[str, float]:
    if not isinstance(data, list | tuple) or len(data) != 2 or not isinstance(data[0], str):
        raise ConfigError("Report.timings: an entry is a pass and its seconds")
    if not isinstance(data[1], int | float):
        raise ConfigError("Report.timings: an entry is a pass and its seconds")
    try:
        return data[0], float(data[1])
    except OverflowError as e:
        raise ConfigError("Report.timings: an entry is a pass and its seconds") from e


def _grouped(lines: list[OpLine]) -> dict[tuple[str, str], list[OpLine]]:
    groups: dict[tuple[str, str], list[OpLine]] = {}
    for line in lines:
        groups.setdefault((line.op, line.detail), []).append(line)
    return groups


_NO_PATTERN = "no quantization pattern for this operator"
_MOVES = (  # several results, or the same numbers under another type: nothing computed
    "split", "split_with_sizes", "unbind", "chunk", "tensor_split", "real", "imag", "view_as_real", "view_as_complex",
)  # fmt: skip


def read_graph(gm: fx.GraphModule) -> tuple[list[OpLine], list[OpLine]]:
    """(quantized, float) operators of an annotated or Q-DQ graph, from its annotations.

    An operator without annotations that computes on float values, and is no part of another one (a view, an
    activation), is float too. What makes values of constants or integers only (masks, positions) is left out. Layers
    inside of the branches of a control-flow operator (`torch.cond`) have a line each, named after their branch.
    """
    quantized, floats = [], []
    for node in gm.graph.nodes:
        notes, pattern = peek_meta(node), pattern_of(node)
        line = OpLine(node.name, module_path(node), notes.get("op") or type_of(node), notes.get("float", ""))
        if pattern is None or pattern.role == "activation":
            if not _computes(node) or line.op in _MOVES or "cast" in notes:
                continue
        if ("op" in notes and "rule" in notes) or ("half" in notes and not _carries(pattern)):
            quantized.append(line)
        elif line.detail or pattern is None:
            floats.append(replace(line, detail=line.detail or _NO_PATTERN))
        floats += _inside(gm, node)
    return quantized, floats


def _carries(pattern: OpPattern | None) -> bool:
    return pattern is not None and pattern.role == "carrier"


def with_activations(
    floats: list[OpLine],
    gm: fx.GraphModule,
    lowered: fx.GraphModule,
    kernels: Collection[str],
    apart: Collection[str] = (),
) -> list[OpLine]:
    """The float operators of a Q-DQ graph, once it is known which activation functions went into kernels.

    Args:
        floats: As `read_graph(gm)` gives them.
        gm, lowered: The Q-DQ graph, and what a backend made of it: a function that is gone there is in a kernel.
        kernels: Names of the operators that run in quantized kernels. The function behind another operator is computed
            with that one, on the reference.
        apart: Names of operators that are gone and in no kernel all the same (see `LoweringReport.apart`).
    """
    left = {(n.name, n.target) for n in lowered.graph.nodes}
    found = {n.name: n for n in gm.graph.nodes if (p := pattern_of(n)) is not None and p.role == "activation"}
    gone = {name for name, node in found.items() if (name, node.target) not in left and name not in apart}
    lines = [line for line in floats if line.name not in gone]
    told = gone.union(line.name for line in lines)
    for name, node in found.items():
        source = node.args[0] if node.args else None
        known = name in told or "half" in peek_meta(node)
        if not known and isinstance(source, fx.Node) and source.name in kernels and _computes(node):
            detail = "the kernel before it does not compute it"
            lines.append(OpLine(name, module_path(node), type_of(node), detail))
    return lines


def type_of(node: fx.Node) -> str:
    """The name of the operator's pattern; without one "relu" for aten operators, "library::name" for others."""
    if (pattern := pattern_of(node)) is not None:
        return pattern.name
    schema = getattr(node.target, "_schema", None)
    return str(node.target) if schema is None else str(schema.name).removeprefix("aten::")


def _inside(gm: fx.GraphModule, node: fx.Node) -> Iterator[OpLine]:
    """The layers in the graphs that `node` runs, as float operators."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    name = str(node.target)
    reason = f"inside of {'torch.' if hasattr(torch, name) else ''}{name}, whose branches are not quantized"
    for read in node.all_input_nodes:
        branch = get_attr(gm, str(read.target)) if read.op == "get_attr" else None
        if not isinstance(branch, fx.GraphModule):
            continue
        for inner in branch.graph.nodes:
            pattern = pattern_of(inner)
            if pattern is not None and pattern.role in ("anchor", "opaque"):
                yield OpLine(f"{read.target}.{inner.name}", module_path(inner), pattern.name, reason)
            for line in _inside(branch, inner):
                yield replace(line, name=f"{read.target}.{line.name}")


def _computes(node: fx.Node) -> bool:
    """Whether an operator of the model makes float or complex values of such, and not of constants alone."""
    if node.op != "call_function" or getattr(node.target, "namespace", "inc") == "inc":
        return False
    inputs = node.all_input_nodes
    return _has_float(node) and any(map(_has_float, inputs)) and any(n.op != "get_attr" for n in inputs)


def _has_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def attribute_bytes(gm: nn.Module) -> int:
    """Bytes of parameters, buffers and packed layers; memory that several names share counts once."""
    seen: dict[Any, int] = {}
    for tensor in [*gm.parameters(), *gm.buffers()]:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr() or id(tensor)] = storage.nbytes()
        else:  # sparse: the values alone
            seen[id(tensor)] = tensor._nnz() * tensor.element_size()
    packed = {id(v): v.nbytes() for m in gm.modules() for v in vars(m).values() if callable(getattr(v, "nbytes", None))}
    return sum(seen.values()) + sum(packed.values())
