"""What became of a model: an object that prints as a table.

Every operator of the model that computes is in one of three lists: in a quantized kernel, quantized but on the reference
implementation, or float with the reason. Nothing is left out in silence.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from inc_graph.graph import module_path, peek_meta
from inc_graph.oppattern import pattern_of

__all__ = ["OpLine", "Report", "attribute_bytes", "read_graph"]


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

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, force_terminal=False)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

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
        table.add_row("bytes", f"{self.bytes_after:,}", f"{share} of {self.bytes_before:,}")
        return Group(table, *(f"note: {n}" for n in self.notes))


def _grouped(lines: list[OpLine]) -> dict[tuple[str, str], list[OpLine]]:
    groups: dict[tuple[str, str], list[OpLine]] = {}
    for line in lines:
        groups.setdefault((line.op, line.detail), []).append(line)
    return groups


def read_graph(gm: fx.GraphModule) -> tuple[list[OpLine], list[OpLine]]:
    """(quantized, float) operators of an annotated or Q-DQ graph, from its annotations."""
    quantized, floats = [], []
    for node in gm.graph.nodes:
        notes = peek_meta(node)
        pattern = pattern_of(node)
        op = notes.get("op") or (pattern.name if pattern else str(node.target).removeprefix("aten.").partition(".")[0])
        if "float" in notes:
            floats.append(OpLine(node.name, module_path(node), op, notes["float"]))
        elif "op" in notes and "rule" in notes:
            quantized.append(OpLine(node.name, module_path(node), op))
    return quantized, floats


def attribute_bytes(gm: nn.Module) -> int:
    """Bytes of parameters, buffers and packed layers; memory that several names share counts once."""
    seen: dict[Any, int] = {}
    for tensor in [*gm.parameters(), *gm.buffers()]:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr() or id(tensor)] = storage.nbytes()
    packed = {id(v): v.nbytes() for m in gm.modules() for v in vars(m).values() if callable(getattr(v, "nbytes", None))}
    return sum(seen.values()) + sum(packed.values())
