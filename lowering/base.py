"""What every backend is: a capability table, ordered claims, and a last step.

`Backend.lower` copies the graph (tensors shared), offers every node to the backend's claims in order, and returns
the copy with a report of what was claimed and what runs on the reference. Nothing that a claim does not take is lost: it
stays quantize / dequantize and is computed by the reference implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from inc_graph.errors import LoweringError
from inc_graph.graph import clone, erase_dead, get_level, module_path, set_level, take_fuel
from inc_graph.ops import is_inc

__all__ = ["Backend", "Claim", "Context", "Lowered", "LoweringReport"]


@dataclass(frozen=True)
class Claim:
    """One rewrite of a backend.

    Attributes:
        name: What the claim makes, for reports.
        wants: Cheap test of an anchor node, such as its target.
        rewrite: Replaces the anchor and what fuses with it; gives a reason if it cannot, None if it did.
        kernel: True if what it makes is a quantized compute kernel (counted), False for conversions and moves.
    """

    name: str
    wants: Callable[[fx.Node], bool]
    rewrite: Callable[[Any, fx.Node], str | None]
    kernel: bool = True


@dataclass
class LoweringReport:
    """What became of a Q-DQ graph.

    Attributes:
        backend: Name of the backend.
        kernels: Node name -> (claim, module path) of each quantized compute kernel.
        absorbed: Name of an operator that disappeared into a kernel -> name of the kernel's node.
        claimed: Count of rewrites by claim.
        missed: Node name -> (module path, reason) of each anchor that a claim looked at and could not take.
        reference: Count of `inc::` operators left to the reference implementation, by operator.
    """

    backend: str
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)
    absorbed: dict[str, str] = field(default_factory=dict)
    claimed: Counter[str] = field(default_factory=Counter)
    missed: dict[str, tuple[str, str]] = field(default_factory=dict)
    reference: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.backend}: " + (", ".join(f"{n} {k}" for k, n in sorted(self.claimed.items())) or "no claims")]
        lines += [f"  {where or node}: {reason}" for node, (where, reason) in self.missed.items()]
        if self.reference:
            lines.append("  on the reference: " + ", ".join(f"{n} {k}" for k, n in sorted(self.reference.items())))
        return "\n".join(lines)


@dataclass
class Lowered:
    """Result of lowering. `packed` maps a weight attribute of the Q-DQ graph to a function that gives its codes back."""

    graph: fx.GraphModule
    report: LoweringReport
    packed: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass
class Context:
    """The graph being lowered, and what claims leave behind (see `Lowered.packed`, `LoweringReport.absorbed`)."""

    gm: fx.GraphModule
    packed: dict[str, Callable[[], Any]] = field(default_factory=dict)
    absorbed: dict[str, str] = field(default_factory=dict)


class Backend(ABC):
    """Base of the backends; one registered instance each.

    `capabilities`: operator type -> the (activation qtype, weight qtype) pairs it has quantized kernels for; an empty tuple
    entry means "any". None: whatever the IR can say (the reference).
    """

    name: ClassVar[str]
    capabilities: ClassVar[dict[str, tuple[tuple[str | None, str | None], ...]] | None] = None

    @abstractmethod
    def available(self) -> str | None:
        """None if it can run here, else the reason why not."""

    def claims(self) -> Sequence[Claim]:
        """Claims in the order in which they are tried on the whole graph."""
        return ()

    def start(self, gm: fx.GraphModule) -> Any:
        """The context that claims get as their first argument."""
        return Context(gm)

    def finish(self, context: Any) -> None:
        """Last changes, before dead code is removed."""

    def supported(self) -> tuple[str, ...] | None:
        """Operator types with kernels, None for all."""
        return None if self.capabilities is None else tuple(sorted(self.capabilities))

    def lower(self, gm: fx.GraphModule) -> Lowered:
        """Lower a Q-DQ graph, which is not changed.

        Raises:
            LoweringError: if the graph is not at level "qdq", or the backend cannot run here.
        """
        if get_level(gm) != "qdq":
            raise LoweringError(f"only a Q-DQ graph can be lowered; this one is at level {get_level(gm)!r}")
        if (reason := self.available()) is not None:
            raise LoweringError(f"backend '{self.name}' is not available: {reason}", hint="backend='eager' always is")
        work = clone(gm)
        report = LoweringReport(self.name)
        context = self.start(work)
        for claim in self.claims():
            for node in list(work.graph.nodes):
                if node._erased or not claim.wants(node) or not (node.users or node.op == "output"):
                    continue
                who, where = node.name, module_path(node)
                reason = claim.rewrite(context, node) if take_fuel() else ""
                if reason is None:
                    report.claimed[claim.name] += 1
                    if claim.kernel:
                        report.kernels[who] = (claim.name, where)
                elif reason:
                    report.missed[who] = (where, reason)
        self.finish(context)
        erase_dead(work)
        report.absorbed = context.absorbed
        report.reference = Counter(str(n.target) for n in work.graph.nodes if is_inc(n))
        set_level(work, "lowered")
        return Lowered(work, report, context.packed)
