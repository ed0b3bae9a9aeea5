"""Which values are in half precision: what rules and the table decide, and for the rest what converts the fewest bytes.

A value that is read in another dtype than it is made in is cast, once, however many read it so: it is a net of its
maker and its readers, which costs its size if they differ. Layers and float32 operators are fixed; FOLLOW operators go
where the sum is least (`_cut`), and to float32 where both are equal. Constants cost nothing: they are stored cast. Nor
does the result of an int8 layer, whose kernel writes either dtype, and `quantize` reads either.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from inc_graph.graph import get_tensor, module_path, module_type, mutated_attrs, peek_meta, val
from inc_graph.oppattern import Named, argument, named, pattern_of
from inc_graph.ops import is_dequantize, is_quantize
from inc_graph.passes._cut import minimum_cut
from inc_graph.passes._eligible import DATA, PARAMETER, kinds, varying
from inc_graph.passes._precision import FLOAT, FOLLOW, HALF, class_of, limits, tensor_limits
from inc_graph.recipe import Recipe, claims, decide

__all__ = ["Halves", "cast_of", "decide_halves", "is_indifferent"]

aten = torch.ops.aten
_NO = object()  # stands for every reader and maker that is float32 whatever happens


@dataclass
class Halves:
    """The decisions on a graph.

    Attributes:
        dtypes: Node -> the half precision that its value is in.
        tails: Nodes among them that are computed in float32 and cast, by the kernel that makes them.
        rules: Node -> index of the rule that gave it its dtype; none without a recipe, nor for FOLLOW operators.
        reasons: Node -> why it is float32.
    """

    dtypes: dict[fx.Node, torch.dtype] = field(default_factory=dict)
    tails: set[fx.Node] = field(default_factory=set)
    rules: dict[fx.Node, int] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def computed(self, node: fx.Node) -> torch.dtype | None:
        """The half precision that a node is computed in, None for float32."""
        return None if node in self.tails else self.dtypes.get(node)


def decide_halves(gm: fx.GraphModule, recipe: Recipe | None, dtype: torch.dtype | None) -> Halves:
    """Decide on a graph of level "float" or "qdq"; with `dtype` all of it, else as the rules of the recipe say."""
    state = _State(gm, recipe, dtype)
    for node in gm.graph.nodes:
        state.look_at(node)
    found = Halves(tails=state.tails, rules=state.rules, reasons=state.reasons)
    for half in dict.fromkeys(state.fixed.values()):
        chosen = minimum_cut(_nets(state, half), _fixed(state, half))
        for node in gm.graph.nodes:
            if state.unit(node) in chosen and node not in found.dtypes:
                found.dtypes[node] = half
                state.fixed.setdefault(state.unit(node), half)
    found.tails = {n for n in state.tails if n in found.dtypes}
    for node in state.wishes:
        if node not in found.dtypes:
            found.reasons.setdefault(node, "its neighbours compute in float32, so half precision would only add casts")
    return found


# ----------------------------------------------------------------------------------------------- who is fixed, and why
@dataclass
class _State:
    gm: fx.GraphModule
    recipe: Recipe | None
    dtype: torch.dtype | None
    kinds: dict[fx.Node, str] = field(init=False)
    varying: set[fx.Node] = field(init=False)
    written: set[str] = field(init=False)
    fixed: dict[fx.Node, torch.dtype] = field(default_factory=dict)  # HALF operators and what their kernels do besides
    wishes: dict[fx.Node, torch.dtype | None] = field(default_factory=dict)  # FOLLOW: the one dtype it may have
    tails: set[fx.Node] = field(default_factory=set)
    rules: dict[fx.Node, int] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds, self.written = kinds(self.gm), mutated_attrs(self.gm)
        self.varying = varying(self.kinds)

    def unit(self, node: fx.Node) -> fx.Node:
        """The operator that a node is a result of."""
        while node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        return node

    def look_at(self, node: fx.Node) -> None:
        if node.op != "call_function" or node.target is operator.getitem or not _is_float32(node):
            return
        if _is_int8(node):
            self._int8(node)
            return
        if node in self.tails or is_dequantize(node):
            return
        source = cast_of(node)
        if source is not None and val(source).dtype in (torch.float16, torch.bfloat16):
            self.tails.add(node)  # what it was cast from is there
            return
        kind, reason = class_of(node)
        if kind == FLOAT:
            self.reasons[node] = reason
            return
        wish, why = self._wish(node, kind)
        if kind == HALF and wish is not None:
            why = self._limits(node, wish) or self._bad_weight(node)
        elif kind == FOLLOW and why is None:
            why = self._bad_operand(node, wish)
        if why is not None or (kind == HALF and wish is None):
            self.reasons[node] = why or "no rule gives it half precision"
        elif kind == HALF and wish is not None:
            self.fixed[node] = wish
        elif (kernel := self._kernel_of(node)) is not None and wish in (None, kernel):
            self.fixed[node] = kernel
        else:
            self.wishes[node] = wish

    def _kernel_of(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of the layer that an activation function stands right behind: its kernel can do both, and a cast
        between them costs what a cast behind them does."""
        pattern, source = pattern_of(node), node.args[0] if node.args else None
        if pattern is None or pattern.role != "activation" or not isinstance(source, fx.Node):
            return None
        return self.fixed.get(source) if len(source.users) == 1 else None

    def _int8(self, node: fx.Node) -> None:
        """The end of a quantized layer: itself, or the activation function that runs in its kernel."""
        pattern = pattern_of(node)
        if pattern is None or pattern.weight is None or not is_dequantize(argument(node, 0)):
            return
        end = node
        if len(node.users) == 1:
            (user,) = node.users
            if (after := pattern_of(user)) is not None and after.role == "activation":
                end = user
        self.tails.add(end)

    def _wish(self, node: fx.Node, kind: str) -> tuple[torch.dtype | None, str | None]:
        """(dtype that the rules give a node, why they leave it float32)."""
        if self.recipe is None or self.dtype is not None:
            return self.dtype, None
        rules, op = self.recipe.rules, _named(node)
        found = claims(rules, op)
        halves = [c for c in found if rules[c.rule].half is not None]
        if halves:
            if kind == HALF:
                self.rules[node] = max(halves).rule
            return rules[max(halves).rule].half, None
        if kind == HALF:
            return None, self.recipe.why_float(decide(rules, op))
        local = [c for c in found if rules[c.rule].floats and rules[c.rule].where.kind != "all"]
        return None, f"kept float by {rules[max(local).rule].origin}" if local else None

    def _bad_weight(self, node: fx.Node) -> str | None:
        pattern = pattern_of(node)
        weight: Any = None if pattern is None or pattern.weight is None else argument(node, pattern.weight)
        if is_dequantize(weight):
            return "its weight is quantized: the kernel decides what it computes in"
        return None

    def _limits(self, node: fx.Node, half: torch.dtype) -> str | None:
        return limits(node, half) or tensor_limits(self.gm, node, half, self.varying, self.written)

    def _bad_operand(self, node: fx.Node, wish: torch.dtype | None) -> str | None:
        for half in [wish] if wish is not None else [torch.float16, torch.bfloat16]:
            if (why := self._limits(node, half)) is not None:
                return why
        for source in node.all_input_nodes:
            if not _is_float32(source) or self.kinds.get(source) in (DATA, PARAMETER):
                continue
            if source.op == "get_attr" and get_tensor(self.gm, source).ndim == 0:
                number = abs(float(get_tensor(self.gm, source)))
                if number <= torch.finfo(torch.float16).max:
                    continue  # it has no say in the dtype of the result
            return f"{source.name}, which it reads, is a mask, a position or a constant"
        return None


def _named(node: fx.Node) -> Named:
    """A node as rules know it, one without a pattern too."""
    if (pattern := pattern_of(node)) is not None:
        return named(node, pattern)
    schema, inner = getattr(node.target, "_schema", None), module_type(node) or ""
    own = [] if schema is None else [schema.name, schema.name.replace("aten::", "torch.")]
    return Named(module_path(node), node.name, frozenset([str(node.target), *own, inner, inner.rpartition(".")[2]]))


def _is_int8(node: fx.Node) -> bool:
    """Whether quantization has decided on a node: it reads codes, or carries them."""
    return bool(peek_meta(node).get("reads")) or "weight" in peek_meta(node)


def _is_float32(node: fx.Node) -> bool:
    values = val(node)
    values = values if isinstance(values, list | tuple) else [values]
    return bool(values) and all(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in values)


# ------------------------------------------------------------------------------------------------------------- the cut
def _fixed(state: _State, half: torch.dtype) -> dict[Any, bool]:
    found: dict[Any, bool] = {node: dtype == half for node, dtype in state.fixed.items()}
    return {_NO: False, **found}


def _nets(state: _State, half: torch.dtype) -> Iterator[tuple[int, list[Any]]]:
    """(size of a value, its maker and its readers) for every value that somebody could want in another dtype."""

    def pin(node: fx.Node, reads: bool) -> Any:
        node = state.unit(node)
        if node in state.fixed:
            return node
        if node in state.wishes:
            return node if state.wishes[node] in (half, None) else _NO
        return _NO if reads or node not in state.tails or not _may(node, half) else node

    for value in state.gm.graph.nodes:
        if value.op not in ("call_function", "placeholder") or not isinstance(val(value), torch.Tensor):
            continue
        if not _is_float32(value):
            continue
        readers = [u for u in value.users if not is_indifferent(u)]
        yield _size(value), [pin(value, False), *(pin(u, True) for u in readers)]


def _may(tail: fx.Node, half: torch.dtype) -> bool:
    """Whether a kernel can write this dtype at its end; what was cast is there in the dtype it was cast from."""
    source = cast_of(tail)
    return half == torch.bfloat16 if source is None else val(source).dtype == half


def is_indifferent(reader: fx.Node) -> bool:
    """Whether an operator gives the same for a value in whatever dtype: it asks for its size, codes or another cast."""
    sizes = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)
    return is_quantize(reader) or reader.target in sizes or cast_of(reader) is not None


def cast_of(node: fx.Node) -> fx.Node | None:
    """What a node casts to another dtype, if that is all it does."""
    if node.op != "call_function" or node.target is not aten._to_copy.default or set(node.kwargs) - {"dtype"}:
        return None
    source = node.args[0]
    floats = isinstance(source, fx.Node) and all(
        isinstance(val(n), torch.Tensor) and val(n).is_floating_point() for n in (source, node)
    )
    return source if floats else None  # type: ignore[return-value]


def _size(node: fx.Node) -> int:
    """Elements of a value, symbolic sizes as in the example that was captured."""
    size = 1
    for d in val(node).shape:
        hint = d if isinstance(d, int) else getattr(getattr(d, "node", None), "hint", None)
        size *= int(hint) if hint is not None else 8
    return max(size, 1)
