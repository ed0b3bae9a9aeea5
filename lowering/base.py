"""What every backend is: a capability table, ordered claims, and a last step.

`Backend.lower` copies the graph (tensors shared), offers every node to the backend's claims in order, and returns the
copy with a report of what was claimed and what runs on the reference. Nothing that a claim does not take is lost: it
stays quantize / dequantize and is computed by the reference implementation, and the report says why.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx, nn

from inc_graph.errors import LoweringError
from inc_graph.graph import (
    clone,
    current_fuel,
    editing,
    erase_dead,
    get_attr,
    get_level,
    module_path,
    set_level,
    take_fuel,
)
from inc_graph.oppattern import pattern_of
from inc_graph.ops import is_dequantize, is_inc
from inc_graph.pattern import Match, NoMatch, Pattern, match
from inc_graph.registry import BACKENDS
from inc_graph.verify import verify

__all__ = ["Backend", "Claim", "Context", "Lowered", "LoweringReport"]


@dataclass(frozen=True)
class Claim:
    """One rewrite of a backend: what to look for, when to leave it alone, and what to make of it.

    Attributes:
        name: What the claim makes, for reports.
        pattern: What to look for. Its root is the anchor.
        rewrite: `rewrite(context, match)` replaces the anchor and what fuses with it. It may give a text that says more
            than `name` for the report.
        check: `check(context, match)` gives None to go ahead, a reason to leave the anchor on the reference, or "" if
            the anchor is none of the claim's business (it is float, say), which nobody needs to read.
        kernel: True if what it makes is a quantized compute kernel (counted), False for conversions and moves.
    """

    name: str
    pattern: Pattern
    rewrite: Callable[[Any, Match], str | None] = field(repr=False)
    check: Callable[[Any, Match], str | None] = field(default=lambda context, found: None, repr=False)
    kernel: bool = True


@dataclass
class LoweringReport:
    """What became of a Q-DQ graph.

    Attributes:
        backend: Name of the backend.
        kernels: Node name -> (claim, module path) of each quantized compute kernel.
        absorbed: Name of an operator that disappeared into a kernel -> name of the kernel's node.
        claimed: Count of rewrites by claim.
        missed: Node name -> (module path, reason) of each operator with quantized inputs that no claim took.
        reference: Count of `inc::` operators left to the reference implementation, by operator.
        apart: Names of operators that are gone from the graph, since a function computes them, and are in no kernel.
    """

    backend: str
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)
    absorbed: dict[str, str] = field(default_factory=dict)
    claimed: Counter[str] = field(default_factory=Counter)
    missed: dict[str, tuple[str, str]] = field(default_factory=dict)
    reference: Counter[str] = field(default_factory=Counter)
    apart: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        lines = [f"{self.backend}: " + (", ".join(f"{n} {k}" for k, n in sorted(self.claimed.items())) or "no claims")]
        lines += [f"  {where or node}: {reason}" for node, (where, reason) in self.missed.items()]
        if self.reference:
            lines.append("  on the reference: " + ", ".join(f"{n} {k}" for k, n in sorted(self.reference.items())))
        return "\n".join(lines)


@dataclass
class Lowered:
    """Result of lowering. `packed`: weight attribute of the Q-DQ graph -> function that gives its codes back."""

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

    `capabilities`: operator type -> the (activation qtype, weight qtype) pairs it has quantized kernels for; None
    stands for an operand that is not quantized or that the operator does not have. The table as a whole is None for a
    backend that runs whatever the IR can say (the reference).
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

    def finish(self, context: Any) -> None:  # noqa: B027 - optional
        """Last changes to the graph, after the claims."""

    def tell(self, context: Any, report: LoweringReport) -> None:  # noqa: B027 - optional
        """Add to the report what the claims do not know."""

    def for_compile(self, lowered: fx.GraphModule) -> nn.Module:
        """What torch.compile is to trace in place of a lowered graph: a copy that shares its tensors, or itself."""
        return lowered

    def supported(self) -> tuple[str, ...] | None:
        """Operator types with kernels, None for all."""
        return None if self.capabilities is None else tuple(sorted(self.capabilities))

    def lower(self, gm: fx.GraphModule) -> Lowered:
        """Lower a Q-DQ graph, which is not changed. With `INC_VERIFY=1` the result is verified.

        Raises:
            LoweringError: if the graph is not at level "qdq", or the backend cannot run here.
        """
        if get_level(gm) != "qdq":
            raise LoweringError(f"only a Q-DQ graph can be lowered; this one is at level {get_level(gm)!r}")
        if (reason := self.available()) is not None:
            here = ", ".join(f"'{name}'" for name, backend in BACKENDS.items() if backend.available() is None)
            raise LoweringError(f"backend '{self.name}' is not available: {reason}", hint=f"available here: {here}")
        work = clone(gm)
        report = LoweringReport(self.name)
        context = self.start(work)
        asked = [n for n in work.graph.nodes if _computes_quantized(n)]
        for claim in self.claims():
            _offer(claim, context, report)
            work.graph.eliminate_dead_code()
        for node in asked:
            if not (node._erased or node.name in report.missed or node.name in context.absorbed):
                report.missed[node.name] = (module_path(node), self._no_kernel(node))
        self.finish(context)
        erase_dead(work)
        _freeze(work)
        report.absorbed = context.absorbed
        self.tell(context, report)
        report.reference = Counter(str(n.target) for n in work.graph.nodes if is_inc(n))
        set_level(work, "lowered")
        if os.environ.get("INC_VERIFY") == "1":
            verify(work)
        return Lowered(work, report, context.packed)

    def _no_kernel(self, node: fx.Node) -> str:
        pattern = pattern_of(node)
        assert pattern is not None
        if self.capabilities is None:
            return f"backend '{self.name}' computes it on the reference"
        if pattern.role == "follower" and pattern.name in self.capabilities:
            return "it does not stand behind a quantized layer that it could be fused into"
        return f"backend '{self.name}' has no quantized kernel for {pattern.name}"


def _offer(claim: Claim, context: Context, report: LoweringReport) -> None:
    """Offer every node to one claim."""
    targets = claim.pattern.targets()
    for node in list(context.gm.graph.nodes):
        if node._erased or not node.users or (targets is not None and node.target not in targets):
            continue
        name, where = node.name, module_path(node)
        found = match(claim.pattern, node)
        if isinstance(found, NoMatch):
            reason: str | None = str(found) if _computes_quantized(node) else ""
        else:
            reason = claim.check(context, found)
        if reason:
            report.missed[name] = (where, reason)
        if reason is not None or not take_fuel():
            continue
        with editing(claim.name, current_fuel()):
            detail = claim.rewrite(context, found)  # type: ignore[arg-type]
        report.claimed[claim.name] += 1
        report.missed.pop(name, None)
        if claim.kernel:
            report.kernels[name] = (detail or claim.name, where)


def _computes_quantized(node: fx.Node) -> bool:
    """True for an operator with a kernel of its own that reads something quantized."""
    pattern = pattern_of(node)
    if pattern is None or pattern.role not in ("anchor", "follower"):
        return False
    return any(is_dequantize(i) for i in node.all_input_nodes)


def _freeze(gm: fx.GraphModule) -> None:
    """A lowered graph is for inference: its parameters, which share the user's memory, ask for no gradient."""
    for node in gm.graph.find_nodes(op="get_attr"):
        value = get_attr(gm, str(node.target))
        if isinstance(value, nn.Parameter) and value.requires_grad:
            prefix, _, leaf = str(node.target).rpartition(".")
            gm.get_submodule(prefix)._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False)
