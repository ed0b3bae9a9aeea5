"""What a graph of each level must look like, as a list of rules that run.

    float      aten and other operators, none of ours; functional; a fake value on every node
    annotated  the same, with annotations that can be read and stand on float tensors
    observed   the same, with observers: submodules that pass one float tensor through unchanged
    trainable  annotated, with submodules that round and that behave otherwise in evaluation
    qdq        no submodules; quantize/dequantize/... agree with their qtype, block, scale and zero point
    lowered    no observers; what is left of our operators still agrees

A rule is a function of one node that gives a complaint or None; its name is what an error shows. Whole-graph facts that
rules need are collected once, so that a check is linear in the size of the graph.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from inc_graph.errors import IncError, VerifyError
from inc_graph.graph import (
    LEVELS,
    dtype,
    fake_call,
    get_attr,
    get_level,
    is_float,
    module_path,
    mutated_attrs,
    peek_meta,
    shape,
)
from inc_graph.oppattern import argument
from inc_graph.ops import is_choose_qparams, is_dequantize, is_fake_quantize, is_inc, is_quantize, is_unpack
from inc_graph.plain import plain
from inc_graph.qtypes import get_qtype
from inc_graph.spec import QSpec, scale_shape

__all__ = ["Violation", "verify", "violations"]

aten = torch.ops.aten
_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_SPEC_FIELDS = {"qtype", "scheme", "granularity", "dynamic"}


@dataclass(frozen=True)
class Violation:
    """One broken rule: its name, the node and what is wrong."""

    rule: str
    node: fx.Node
    detail: str


@dataclass
class _Facts:
    gm: fx.GraphModule
    level: str
    mutated: set[str]
    names: dict[str, fx.Node]


def _args(node: fx.Node) -> Any:
    """Arguments without FX's union of everything; those of our operators in the order of the schema, kwargs too."""
    if not is_inc(node):
        return node.args
    return tuple(argument(node, i) for i in range(len(node.target._schema.arguments)))  # type: ignore[union-attr]


def _target(node: fx.Node) -> str:
    """Attribute path of a get_attr or call_module node."""
    return str(node.target)


Check = Callable[[fx.Node, _Facts], str | None]


def verify(gm: fx.GraphModule, level: str | None = None) -> None:
    """Check the graph against its level (or `level`). VerifyError names the rule and the node of the first complaint.

    Also runs FX's own lint. Bodies of control flow are checked too.
    """
    level = level or get_level(gm)
    if level not in LEVELS:
        raise VerifyError(f"unknown level {level!r}", hint=f"levels are {', '.join(LEVELS)}")
    try:
        gm.graph.lint()
    except Exception as e:
        raise VerifyError(f"not a well-formed graph: {e}") from e
    with plain():
        found = list(violations(gm, level))
    if found:
        first, more = found[0], len(found) - 1
        rest = f" (and {more} more)" if more else ""
        message = f"not a graph of level {level!r}: {first.rule}: {first.detail}{rest}"
        raise VerifyError(message, node=first.node.name, module=module_path(first.node))


def violations(gm: fx.GraphModule, level: str | None = None) -> Iterator[Violation]:
    """All complaints about the graph, in graph order."""
    facts = _Facts(gm, level or get_level(gm), set(), {n.name: n for n in gm.graph.nodes})
    checks = _RULES[facts.level]
    bodies = []
    for node in gm.graph.nodes:
        if node.op == "get_attr" and (detail := _attr_exists(node, facts)) is not None:
            yield Violation("attributes exist", node, detail)
            return  # other rules read attributes
    facts.mutated = mutated_attrs(gm)
    for node in gm.graph.nodes:
        for name, check in checks:
            try:
                detail = check(node, facts)
            except IncError as e:  # what the node says cannot even be read: an unknown qtype, say
                detail = e.message
            if detail is not None:
                yield Violation(name, node, detail)
        if node.op == "get_attr" and isinstance(body := get_attr(gm, _target(node)), fx.GraphModule):
            bodies.append(body)
    for body in bodies:
        yield from violations(body, facts.level)


# ------------------------------------------------------------------------------------------------------ every level
def _attr_exists(node: fx.Node, facts: _Facts) -> str | None:
    try:
        value = get_attr(facts.gm, _target(node))
    except IncError as e:
        return e.message
    if facts.level == "lowered" or isinstance(value, torch.Tensor | nn.Module):  # a backend has objects of its own
        return None
    return f"{node.target} is a {type(value).__name__}"


def _has_val(node: fx.Node, facts: _Facts) -> str | None:
    return "no meta['val']" if node.op != "output" and "val" not in node.meta else None


def _attr_val(node: fx.Node, facts: _Facts) -> str | None:
    if node.op != "get_attr" or not isinstance(value := get_attr(facts.gm, _target(node)), torch.Tensor):
        return None
    if dtype(node) != value.dtype or not _same_shape(shape(node), value.shape):
        return f"meta['val'] says {dtype(node)} {shape(node)}, the tensor is {value.dtype} {tuple(value.shape)}"
    return None


def _call_val(node: fx.Node, facts: _Facts) -> str | None:
    """The fake value of an operator call is what the operator gives. Where a size is symbolic nobody knows for sure."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    sources = [*node.all_input_nodes, node]
    if not all(isinstance(v := n.meta.get("val"), torch.Tensor) and _is_static(v) for n in sources):
        return None
    try:
        made = fake_call(facts.gm, node.target, node.args, node.kwargs)
    except Exception:  # a value that depends on data, an operator without a fake form
        return None
    if not isinstance(made, torch.Tensor) or not _is_static(made):
        return None
    if made.dtype != dtype(node) or tuple(made.shape) != tuple(shape(node) or ()):
        return f"meta['val'] says {dtype(node)} {shape(node)}, {node.target} gives {made.dtype} {tuple(made.shape)}"
    return None


def _is_static(x: torch.Tensor) -> bool:
    return all(isinstance(d, int) for d in x.shape)


def _known_target(node: fx.Node, facts: _Facts) -> str | None:
    if node.op == "call_method":
        return "methods are not part of the normal form"
    if node.op != "call_function":
        return None
    target = node.target
    if getattr(target, "__name__", "") in _REGIONS:
        return "grad-mode and autocast regions must be written out"
    if facts.level == "lowered" and isinstance(target, types.FunctionType):  # of a backend, which may be an extension
        return None
    known = torch._ops.OpOverload | torch._ops.HigherOrderOperator
    if isinstance(target, known) or getattr(target, "__module__", "") in ("_operator", "operator", "math", "torch"):
        return None
    return f"{target} is not an operator overload"


def _functional(node: fx.Node, facts: _Facts) -> str | None:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return None
    if node.target is aten.copy_.default and _args(node)[0].op in ("get_attr", "placeholder"):
        return None
    return f"{node.target} writes to its argument"


def _annotations(node: fx.Node, facts: _Facts) -> str | None:
    notes = peek_meta(node)
    if not notes:
        return None
    try:
        if json.loads(json.dumps(notes)) != notes:
            return "custom.inc changes when written as JSON and read back"
    except (TypeError, ValueError) as e:
        return f"custom.inc is not JSON: {e}"
    return None


_COMMON: tuple[tuple[str, Check], ...] = (
    ("every node has a fake value", _has_val),
    ("attributes are what the graph says", _attr_val),
    ("known operators only", _known_target),
    ("functional", _functional),
    ("annotations are JSON", _annotations),
    ("fake values are those of the operators", _call_val),
)


# ------------------------------------------------------------------------------------------- float, annotated, observed
def _no_dialect(node: fx.Node, facts: _Facts) -> str | None:
    return f"{node.target} before conversion" if is_inc(node) else None


def _no_modules(node: fx.Node, facts: _Facts) -> str | None:
    return f"call of submodule {node.target}" if node.op == "call_module" else None


def _specs(notes: Any) -> Iterator[tuple[str, Any]]:
    """(where, data) of everything in an annotation that looks like a QSpec."""
    todo = [("", notes)]
    while todo:
        where, data = todo.pop()
        if isinstance(data, dict):
            if data.keys() >= _SPEC_FIELDS:
                yield where, data
                continue
            todo += [(f"{where}.{k}".lstrip("."), v) for k, v in data.items()]
        elif isinstance(data, list):
            todo += [(f"{where}.{i}", v) for i, v in enumerate(data)]


def _specs_parse(node: fx.Node, facts: _Facts) -> str | None:
    for where, data in _specs(peek_meta(node)):
        try:
            QSpec.from_json(data)
        except IncError as e:
            return f"annotation '{where}': {e.message}"
    return None


def _quantized_values(node: fx.Node, facts: _Facts) -> str | None:
    """`quant` stands on a float tensor that the graph does not write to, and is read in each of its formats."""
    quant = peek_meta(node).get("quant", {})
    if not quant:
        return None
    if not is_float(node):
        return f"quantized value is {dtype(node) or 'not one tensor'}"
    if node.op == "get_attr" and node.target in facts.mutated:
        return f"quantized value {node.target} is a buffer that the graph writes to"
    read = {peek_meta(r).get("reads", {}).get(node.name) for r in _readers(node)}
    unread = set(quant) - read
    return f"no reader wants it in format {', '.join(sorted(unread))}" if unread else None


def _reads_exist(node: fx.Node, facts: _Facts) -> str | None:
    """`reads` names inputs of the node, in formats that those values are annotated with."""
    for name, key in peek_meta(node).get("reads", {}).items():
        source = facts.names.get(name)
        if source is None or node not in _readers(source):
            return f"reads {name!r}, which is not an input"
        if key not in peek_meta(source).get("quant", {}):
            return f"reads {name!r} in format {key!r}, which it is not annotated with"
    return None


def _weights_are_constants(node: fx.Node, facts: _Facts) -> str | None:
    """`weight` stands on a call that has a float attribute, which the graph does not write to, among its inputs."""
    if "weight" not in peek_meta(node):
        return None
    attrs = [n for n in node.all_input_nodes if n.op == "get_attr" and is_float(n)]
    if not attrs:
        return "annotated with a weight, but reads no float attribute"
    written = [n.target for n in attrs if n.target in facts.mutated]
    return f"weight {written[0]} is a buffer that the graph writes to" if written else None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users, with observers looked through."""
    found = []
    for user in node.users:
        found += _readers(user) if user.op == "call_module" else [user]
    return found


def _observer_is_identity(node: fx.Node, facts: _Facts) -> str | None:
    if node.op != "call_module":
        return None
    if len(node.all_input_nodes) != 1 or len(_args(node)) != 1 or node.kwargs:
        return "an observer takes one tensor"
    source = _args(node)[0]
    if not is_float(source):
        return f"observes {source.name}, which is {dtype(source) or 'not one tensor'}"
    if source.op == "get_attr" and source.target in facts.mutated:
        return f"observes {source.target}, which the graph writes to"
    if dtype(node) != dtype(source) or not _same_shape(shape(node), shape(source)):
        return "an observer gives its input through unchanged, but the values differ"
    return None


# ------------------------------------------------------------------------------------------------------ qdq, lowered
def _quantizes_floats(node: fx.Node, facts: _Facts) -> str | None:
    if not (is_quantize(node) or is_fake_quantize(node) or is_choose_qparams(node)):
        return None
    source = _args(node)[0]
    if not is_float(source):
        return f"input {source.name} is {dtype(source)}, only floats are quantized"
    if source.op == "get_attr" and source.target in facts.mutated:
        return f"input {source.target} is written to by the graph"
    return None


def _carrier(node: fx.Node, facts: _Facts) -> str | None:
    if not is_dequantize(node):
        return None
    qtype = get_qtype(_args(node)[4])
    if dtype(_args(node)[0]) != qtype.carrier:
        return f"codes of {qtype.name} are {qtype.carrier}, input {_args(node)[0].name} is {dtype(_args(node)[0])}"
    source = _args(node)[0]
    while source.op == "call_function" and not (is_quantize(source) or is_unpack(source)):
        if not source.all_input_nodes or dtype(source) != qtype.carrier or is_inc(source):
            return f"codes come from {source.name}, not from quantize or an attribute"
        source = source.all_input_nodes[0]  # views, permutations and copies of codes
    if is_quantize(source) and get_qtype(_args(source)[4]) != qtype:
        return f"codes were made as {_args(source)[4]} and are read as {_args(node)[4]}"
    if is_quantize(source) and (_args(source)[2] is None) != (_args(node)[2] is None):
        words = ("without", "with") if _args(source)[2] is None else ("with", "without")
        return f"codes were made {words[0]} a zero point and are read {words[1]} one"
    if is_unpack(source) and get_qtype(_args(source)[1]) != qtype:
        return f"codes were packed as {_args(source)[1]} and are read as {_args(node)[4]}"
    if source.op == "get_attr" and source.target in facts.mutated:
        return f"codes {source.target} are written to by the graph"
    return None


_ZERO_POINTS = (torch.int32, torch.int8, torch.uint8)


def _layout(node: fx.Node, facts: _Facts) -> str | None:
    if not (is_quantize(node) or is_dequantize(node) or is_fake_quantize(node)):
        return None
    x, scale, zero_point, block = _args(node)[:4]
    qtype = get_qtype(_args(node)[4])
    dims = shape(x)
    if dims is None or len(block) != len(dims):
        return f"block {list(block)} for a tensor of shape {dims}"
    sizes = [b.meta.get("val", b) if isinstance(b, fx.Node) else b for b in block]
    want = scale_shape(dims, sizes)
    if not _same_shape(shape(scale), want):
        return f"scale has shape {list(shape(scale) or ())}, block {sizes} of {list(dims)} needs {list(want)}"
    if not is_float(scale):
        return f"scale is {dtype(scale)}"
    if zero_point is None:
        return None
    kind = dtype(zero_point)
    if kind not in _ZERO_POINTS and not is_float(zero_point):
        return f"zero point is {kind}, must be an integer of 8 or 32 bits, or floating point"
    if not _same_shape(shape(zero_point), want):
        return f"zero point has shape {list(shape(zero_point) or ())}, must be {list(want)}"
    return f"{qtype.name} has no zero point" if not qtype.is_int else None


def _no_observers(node: fx.Node, facts: _Facts) -> str | None:
    if node.op != "call_module":
        return None
    module = get_attr(facts.gm, _target(node))
    return f"observer {node.target} is still there" if hasattr(module, "calculate_qparams") else None


def _same_shape(a: Any, b: Any) -> bool:
    """Equal shapes; a dimension known only at run time agrees with every other."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(not isinstance(x, int) or not isinstance(y, int) or x == y for x, y in zip(a, b, strict=True))


_BEFORE = (("no operators of ours", _no_dialect), ("annotations are specs", _specs_parse))
_ANNOTATED: tuple[tuple[str, Check], ...] = (
    ("quantized values are floats", _quantized_values),
    ("readers read what is quantized", _reads_exist),
    ("weights are constants", _weights_are_constants),
)
_QDQ: tuple[tuple[str, Check], ...] = (
    ("only floats are quantized", _quantizes_floats),
    ("codes are of their qtype", _carrier),
    ("scales fit their block", _layout),
)
_RULES: dict[str, tuple[tuple[str, Check], ...]] = {
    "float": (*_COMMON, *_BEFORE, ("no submodules", _no_modules)),
    "annotated": (*_COMMON, *_BEFORE, ("no submodules", _no_modules), *_ANNOTATED),
    "observed": (
        *_COMMON,
        *_BEFORE,
        ("observers change nothing", _observer_is_identity),
        *_ANNOTATED,
    ),
    "trainable": (*_COMMON, *_BEFORE, *_ANNOTATED[:2]),
    "qdq": (*_COMMON, ("no submodules", _no_modules), *_QDQ),
    "lowered": (*_COMMON[:3], *_COMMON[4:], ("no observers", _no_observers), *_QDQ),
}
