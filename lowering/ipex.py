"""Intel Extension for PyTorch: static int8 operators in the fusion groups of oneDNN's graph compiler (LLGA).

    dequantize(x) , dequantize(w) -> linear | conv [-> ...] [-> quantize]     one TorchScript function for all of them,
                                                                              in which IPEX makes int8 groups
    dequantize(x) , dequantize(y) -> matmul [-> ...] [-> quantize]            the same
    choose_qparams(x) -> quantize -> dequantize , dequantize(w) -> linear     dynamic layers as on `inductor`
    x (float) , dequantize(w) -> linear                                       weight-only layers as on `inductor`
    lstm_steps, gru_steps with dequantize(w)                                  as on `inductor`
    dequantize(table) -> embedding                                            looks up codes

IPEX fuses when it compiles the function, by rules of its own. So the function is run when it is made, and what stands
in the groups then is what the report counts. What IPEX takes into no group computes in float between quantize and
dequantize, as on the reference. A function holds for all shapes that the graph holds for: IPEX compiles the groups for
each shape when it is seen first.

Anything else whose scales are computed at run time, and formats of other than 8 bits, run on the reference.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from inc_graph.errors import IncWarning
from inc_graph.graph import module_path, mutated_attrs, unique_name, val
from inc_graph.lowering._context import OneDnnContext
from inc_graph.lowering._dynamic_claims import DYNAMIC_LINEAR
from inc_graph.lowering._dynamic_joined import join_layers
from inc_graph.lowering._ipex import Scripted, example, import_ipex, run_scripted, why_not
from inc_graph.lowering._recurrent import GRU, LSTM, PROJECT
from inc_graph.lowering._regions import NotTraced
from inc_graph.lowering._segments import borders, parts, replace_part
from inc_graph.lowering._torchscript import constant, scriptable, write
from inc_graph.lowering._uneven_padding import CONV, PadContext, check_pad, rewrite_pad
from inc_graph.lowering._weight_only_claims import LOOKUP, WEIGHT_ONLY, WEIGHT_VALUES
from inc_graph.lowering._x86 import X86Backend, capabilities
from inc_graph.lowering.base import Claim, LoweringReport
from inc_graph.oppattern import pattern_of
from inc_graph.ops import is_dequantize
from inc_graph.pattern import P
from inc_graph.registry import BACKENDS

__all__ = ["Ipex"]


def _codes(weight: Tensor, part_of: tuple[slice, ...]) -> Tensor:
    return weight.int_repr()[part_of].contiguous()


def _quantized(node: fx.Node) -> Any:
    """The pattern of an operator that computes on something quantized."""
    pattern = pattern_of(node)
    known = pattern is not None and pattern.role in ("anchor", "follower")
    return pattern if known and any(is_dequantize(i) for i in node.all_input_nodes) else None


def _check_values(c: OneDnnContext, found: Any) -> str | None:
    """Of a weight whose layer has quantized inputs the function speaks."""
    quantized = any(any(is_dequantize(i) for i in u.all_input_nodes if i is not found.root) for u in found.root.users)
    return "" if quantized else WEIGHT_VALUES.check(c, found)


@dataclass
class _Context(PadContext):
    groups: int = 0
    inside: dict[str, tuple[str, str]] = field(default_factory=dict)  # operator in a group -> its type, its module
    apart: set[str] = field(default_factory=set)  # operators that a function computes outside of the groups


class Ipex(X86Backend):
    """int8 groups of Intel Extension for PyTorch on x86 CPUs; weight-only layers are those of `inductor`."""

    name = "ipex"
    capabilities: ClassVar = capabilities(
        tuple(f"conv{d}d" for d in (1, 2, 3)), ("matmul",), weight_only=("lstm_steps", "gru_steps", "projection")
    )

    def lacks(self) -> str | None:
        return why_not()

    def start(self, gm: fx.GraphModule) -> _Context:
        import_ipex()
        return _Context(gm, compute_dtype=self.compute_dtype)

    def claims(self) -> tuple[Claim, ...]:
        values = Claim(WEIGHT_VALUES.name, WEIGHT_VALUES.pattern, WEIGHT_VALUES.rewrite, _check_values, kernel=False)
        pad = Claim("uneven padding", P(CONV), rewrite_pad, check_pad, kernel=False)
        return DYNAMIC_LINEAR, WEIGHT_ONLY, PROJECT, LSTM, GRU, LOOKUP, values, pad

    def finish(self, context: _Context) -> None:
        join_layers(context)
        gm, mutated = context.gm, mutated_attrs(context.gm)
        asked = {n: (p.name, module_path(n)) for n in gm.graph.nodes if (p := _quantized(n)) is not None}

        def held(node: fx.Node) -> bool:
            return constant(context, node, mutated)

        for part in parts(gm.graph, lambda n: scriptable(context, n), held):
            inputs, outputs = borders(part, held)
            if not outputs or not any(is_dequantize(n) for n in part):
                continue
            try:
                written = write(context, part, inputs, outputs)
                script = Scripted(written, [example(val(n)) for n in inputs])
            except RuntimeError as e:  # torch's, of what it cannot compile or run
                first = next((line for line in str(e).splitlines() if line.strip()), "")
                text = f"IPEX cannot run the graph from {part[0].name} to {part[-1].name}: {first}"
                warnings.warn(f"{text}; it runs on the reference", IncWarning, stacklevel=2)
                continue
            context.groups += script.groups
            context.inside.update({n.name: asked[n] for n in part if n in asked and n.name in script.operators})
            context.apart.update(n.name for n in part if pattern_of(n) is not None and n.name not in script.inside)
            name = unique_name(gm, "script")
            setattr(gm, name, script)
            with gm.graph.inserting_before(part[0]):
                read = gm.graph.create_node("get_attr", name, (), {})
            read.meta["val"] = None
            replace_part(gm, part, outputs, run_scripted, (inputs, read))
            for attr, weight in written.codes.items():
                attr, part_of = context.widened.get(attr, (attr, ()))
                context.packed.setdefault(attr, partial(_codes, weight, part_of))

    def tell(self, context: _Context, report: LoweringReport) -> None:
        report.apart = context.apart
        for name, (op, where) in context.inside.items():
            report.missed.pop(name, None)
            report.kernels[name] = (f"int8 {op} in a group of oneDNN Graph", where)
            report.claimed[f"int8 {op}"] += 1
        if context.groups:
            report.claimed["int8 group"] += context.groups

    def _no_kernel(self, node: fx.Node) -> str:
        return "IPEX took it into no int8 group; it computes in float between quantize and dequantize"

    def for_compile(self, lowered: fx.GraphModule) -> nn.Module:
        return NotTraced(lowered) if any(n.target is run_scripted for n in lowered.graph.nodes) else lowered


BACKENDS.add("ipex", Ipex())
