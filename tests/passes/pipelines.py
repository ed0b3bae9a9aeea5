"""Short ways from a module to a graph of a level, for the tests of the passes. No backend takes part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from inc_graph.capture import capture
from inc_graph.graph import clone, get_tensor, inc_meta, peek_meta
from inc_graph.oppattern import pattern_of
from inc_graph.ops import is_dequantize, is_quantize
from inc_graph.passmanager import Pipeline, PipelineResult
from inc_graph.recipe import OpQuant, Recipe, Where, WhereRule, set_recipe
from inc_graph.spec import PerChannel, QSpec
from inc_graph.text import to_text

FLOAT = "canonicalize,fold-conv-bn"
U8 = QSpec("uint8", "asymmetric")
S8 = QSpec("int8", "symmetric")
INT8 = OpQuant(U8, QSpec("int8", "symmetric", PerChannel(0)))
WEIGHT_ONLY = replace(INT8, activation=None)
CORRECTED = replace(INT8, bias_correction=True)


def name(value: str, what: OpQuant | None = None) -> WhereRule:
    return WhereRule(Where("name", value), what, f"set_local({value!r})")


def kind(value: str, what: OpQuant | None = None) -> WhereRule:
    return WhereRule(Where("type", value), what, f"set_local({value})")


def recipe(*local: WhereRule, everything: OpQuant | None = INT8, supported: tuple[str, ...] | None = None) -> Recipe:
    """Rules for the passes; `supported` plays a backend called "tiny"."""
    backend = "eager" if supported is None else "tiny"
    return Recipe("test", (WhereRule(Where(), everything), *local), "", "", supported, backend)


def run(gm: fx.GraphModule, passes: str) -> PipelineResult:
    return Pipeline.parse(passes).run(gm)


def captured(model: nn.Module, *args: Any, dynamic: Any = None, **kwargs: Any) -> fx.GraphModule:
    return capture(model.eval(), args, kwargs, dynamic_shapes=dynamic)


def annotate(model: nn.Module, *args: Any, plan: Recipe | None = None, **kwargs: Any) -> PipelineResult:
    gm = captured(model, *args, **kwargs)
    set_recipe(gm, plan or recipe())
    return run(gm, f"{FLOAT},annotate")


def observe(model: nn.Module, *args: Any, plan: Recipe | None = None, **kwargs: Any) -> fx.GraphModule:
    return run(annotate(model, *args, plan=plan, **kwargs).graph, "insert-observers").graph


def quantize(
    model: nn.Module,
    *args: Any,
    plan: Recipe | None = None,
    data: Iterable[tuple[Any, ...]] | None = None,
    **kwargs: Any,
) -> fx.GraphModule:
    """The Q-DQ graph, calibrated on `data` (default: the example inputs)."""
    observed = observe(model, *args, plan=plan, **kwargs)
    kwargs.pop("dynamic", None)
    with torch.no_grad():
        for batch in [args] if data is None else data:
            observed(*batch, **kwargs)
    return run(clone(observed), "correct-bias,convert-qdq").graph


def float_twin(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The graph that `quantize` started from: the same operators without quantization."""
    return run(captured(model, *args, **kwargs), FLOAT).graph


def text(result: PipelineResult | fx.GraphModule) -> str:
    """A graph, and after it what its passes matched and missed."""
    if isinstance(result, fx.GraphModule):
        return to_text(result)
    return to_text(result.graph) + "\n" + "\n".join(map(str, result.reports)) + "\n"


# ------------------------------------------------------------------------------------------------- reading a graph
def calls(gm: fx.GraphModule) -> list[str]:
    """Names of the operators called, in order, without our own and getitem."""
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function" and hasattr(n.target, "_schema")]
    return [t._schema.name.removeprefix("aten::") for t in targets if not t._schema.name.startswith("inc::")]


def find(gm: fx.GraphModule, op: str) -> list[fx.Node]:
    """Calls of `aten.<op>`, in order."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and str(n.target).startswith(f"aten.{op}.")]


def find_one(gm: fx.GraphModule, op: str) -> fx.Node:
    (node,) = find(gm, op)
    return node


def why_float(gm: fx.GraphModule, op: str) -> str:
    """The reason why the one call of `aten.<op>` stays float."""
    return peek_meta(find_one(gm, op))["float"]


def reads(gm: fx.GraphModule, op: str) -> int:
    """How many values the one call of `aten.<op>` reads quantized."""
    return len(inc_meta(find_one(gm, op)).get("reads", {}))


def qparams(gm: fx.GraphModule, node: fx.Node) -> tuple[list[float], list[int] | None, str]:
    """(scales, zero points, qtype) of a quantize or dequantize node, as numbers."""
    scale, zero, _, qtype = node.args[1:5]
    numbers = [None if p is None else get_tensor(gm, p).flatten().tolist() for p in (scale, zero)]  # type: ignore[arg-type]
    return numbers[0], numbers[1], str(qtype)  # type: ignore[return-value]


def pairs(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(quantize, dequantize) of the activations."""
    for node in gm.graph.nodes:
        if is_dequantize(node) and is_quantize(node.args[0]):
            yield node.args[0], node


def check_pairs(gm: fx.GraphModule) -> None:
    """int8 stays int8: nothing is requantized twice, and an operator that moves elements keeps their scale."""
    for node in gm.graph.nodes:
        if is_quantize(node):
            assert not is_dequantize(node.args[0]), f"{node} requantizes what {node.args[0]} just dequantized"
            same = [u for u in node.args[0].users if is_quantize(u) and u.args[1:] == node.args[1:]]
            assert same == [node], f"{node.args[0]} is quantized twice in the same way"
            assert all(is_dequantize(u) and qparams(gm, u) == qparams(gm, node) for u in node.users)
        pattern = pattern_of(node)
        if pattern is None or pattern.role != "carrier":
            continue
        after = [qparams(gm, u) for u in node.users if is_quantize(u)]
        before = [v for v in pattern.activations(node) if is_dequantize(v)]
        if len(after) == len(node.users) == 1 and before:
            assert all(qparams(gm, v) == after[0] for v in before), f"{node} changes the scale of what it moves"


# --------------------------------------------------------------------------------------------------------- comparing
def leaves(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def sqnr(want: Any, got: Any) -> float:
    """Signal to quantization noise in dB over all float outputs together."""
    both = [(a.double(), b.double()) for a, b in zip(leaves(want), leaves(got), strict=True) if a.is_floating_point()]
    signal = sum(float((a**2).sum()) for a, _ in both)
    noise = sum(float(((a - b) ** 2).sum()) for a, b in both)
    return float("inf") if noise == 0 else 10 * float(torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def same_bits(a: Any, b: Any) -> bool:
    """Equal bit for bit."""
    pairs_ = list(zip(leaves(a), leaves(b), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs_)


def bits(model: nn.Module) -> Callable[[], bool]:
    """Remember all tensors of a model; the function says whether they are still the same bit for bit."""
    objects = {n: (t, t.detach().clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}

    def unchanged() -> bool:
        now = dict([*model.named_parameters(), *model.named_buffers()])
        return now.keys() == objects.keys() and all(
            now[n] is t and torch.equal(t.detach(), old) for n, (t, old) in objects.items()
        )

    return unchanged
