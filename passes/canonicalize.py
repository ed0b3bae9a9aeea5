"""Remove what means nothing at inference, and spell operators the way that the other passes and the backends look for.

    dropout(x, p, train=False) = x                 clone(x) = contiguous(x) = x, if x has that layout already
    to(x, its own dtype) = x                       clamp_min(x, a) = clamp(x, a, None);  the same for clamp_max
    addmm(b, x, W) = linear(x, W^T, b)             mm(x, W) = matmul(x, W) = linear(x, W^T)         (W constant, 2-D)
    conv(pad(x, 0 around), padding=p) = conv(x, padding=p + pad)                                    (same on both sides)
    x * sigmoid(x) = silu(x)                       x * relu6(x + 3) / 6 = x * hardsigmoid(x) = hardswish(x)

W may be read through a transposition, which is then undone and not done twice. A copy that the caller gets to see
stays.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from inc_graph.graph import (
    dtype,
    erase_dead,
    get_tensor,
    inc_meta,
    insert_call,
    insert_get_attr,
    is_float,
    mutated_attrs,
    replace_uses,
    set_tensor,
    shape,
    storage_key,
    take_fuel,
    val,
)
from inc_graph.oppattern import argument, pattern_of, set_arguments
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.pattern import Any as Anything
from inc_graph.pattern import Match, Or, P
from inc_graph.registry import PASSES
from inc_graph.rewrite import Rule, apply_rules

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default, aten._to_copy.default)
_RETURNS = (
    aten.to.dtype,
    aten.type_as.default,
    aten.alias.default,
    aten.detach.default,
)  # x itself, if they do nothing
_PRODUCTS: dict[Any, tuple[int, int, int | None]] = {
    aten.addmm.default: (1, 2, 0),
    aten.mm.default: (0, 1, None),
    aten.matmul.default: (0, 1, None),
}
_CONVS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_SPELLINGS: dict[Any, tuple[Any, Any]] = {
    aten.clamp_min.default: (aten.clamp.default, lambda x, a: (x, a, None)),
    aten.clamp_max.default: (aten.clamp.default, lambda x, a: (x, None, a)),
    aten.constant_pad_nd.default: (aten.pad.default, lambda x, widths, value=0: (x, widths, "constant", value)),
}


@dataclass
class _State:
    gm: fx.GraphModule
    mutated: set[str]
    leaving: set[fx.Node]
    trainable: bool
    transposed: dict[Any, str] = field(default_factory=dict)  # memory of a matrix -> attribute that holds its transpose


@PASSES.register("canonicalize")
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop identities, and write operators in one of the ways they can be written.

    Option: `trainable` keeps parameters where they are, as no copy of one takes its place; and `detach`, as it stops a
    gradient.
    """

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "float"
    trainable: bool = False

    def run(self, gm: fx.GraphModule) -> PassResult:
        report = PassReport()
        state = _State(gm, mutated_attrs(gm), _leaving(gm.graph), self.trainable)
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _PRODUCTS:
                why = _product(state, node)
            elif node.target in _CONVS:
                why = _fold_pad(node, _CONVS[node.target])
            elif node.target in _SPELLINGS:
                why = _spell(state, node)
            else:
                why = _identity(state, node)
            if why is None:
                report.matched.append(node.name)
            elif why:
                report.missed.append((node.name, why))
        report.matched += apply_rules(gm, _RULES).matched
        if report.matched:
            erase_dead(gm)
        return PassResult(gm, bool(report.matched), report)


# A rewrite below returns None if it was done, "" if it does not concern the node, else why it was not done.


# ------------------------------------------------------------------------------------------------------- identities
def _leaving(graph: fx.Graph) -> set[fx.Node]:
    """Values whose memory the caller, or a buffer, gets to see, perhaps through views."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            returns = getattr(getattr(user.target, "_schema", None), "returns", None)
            views = returns is None or any(r.alias_info is not None for r in returns) or user.target in _DROPOUTS
            if user.op == "output" or user.target is aten.copy_.default or (user in found and views):
                found.add(node)
    return found


def _identity(state: _State, node: fx.Node) -> str | None:
    source: Any = node.args[0] if node.args else None
    if (dropout := _dropout(node)) is not None:
        if argument(dropout, 2) is not False and argument(dropout, 1) != 0:
            return "the dropout is in training mode"
        source = dropout.args[0]
    elif node.target not in _COPIES and node.target not in _RETURNS and not _all_of(node):
        return ""
    elif not _same(source, node) or (node.target in _COPIES and node in state.leaving):
        return ""
    if source.op == "get_attr" and source.target in state.mutated:
        return "it holds the value of a buffer from before the model writes to it"
    if node.target is aten.detach.default and (
        state.trainable or any(u.target is aten.copy_.default for u in node.users)
    ):
        return ""  # buffers take no history
    if not take_fuel():
        return ""
    replace_uses(node, source)
    for dead in [*dropout.users, dropout] if dropout is not None else ():  # random, so nobody else would remove it
        if not dead.users:
            state.gm.graph.erase_node(dead)
    return None


def _all_of(node: fx.Node) -> bool:
    """Whether it takes a slice of everything, as torch before 2.9 writes for each `:` of an index."""
    if node.target is not aten.slice.Tensor:
        return False
    _, dim, start, end, step = (argument(node, i) for i in range(5))
    size = val(node.args[0]).shape[dim or 0]  # type: ignore[arg-type]
    beyond = end is None or (isinstance(end, int) and (end == sys.maxsize or (isinstance(size, int) and end >= size)))
    return start in (None, 0) and step in (None, 1) and beyond


def _dropout(node: fx.Node) -> fx.Node | None:
    """The dropout that this node is the result of."""
    if node.target is operator.getitem and node.args[1] == 0:
        source: Any = node.args[0]
        return source if source.target is aten.native_dropout.default else None
    return node if node.target in _DROPOUTS else None


def _same(a: Any, b: fx.Node) -> bool:
    """Whether two nodes hold tensors of one dtype, device and layout in memory."""
    x, y = val(a) if isinstance(a, fx.Node) else None, val(b)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if (x.dtype, x.device, x.layout) != (y.dtype, y.device, y.layout):
        return False
    if x.layout != torch.strided:
        return True
    return list(map(str, x.stride())) == list(map(str, y.stride()))  # str: comparing symbols would add guards


# --------------------------------------------------------------------------------------------------- other spellings
def _spell(state: _State, node: fx.Node) -> str | None:
    if not take_fuel():
        return ""
    target, arguments = _SPELLINGS[node.target]
    replace_uses(node, insert_call(state.gm, target, arguments(*node.args), before=node, like=node))
    return None


def _product(state: _State, node: fx.Node) -> str | None:
    """A product with a constant matrix becomes a linear layer."""
    gm = state.gm
    x_at, w_at, b_at = _PRODUCTS[node.target]
    x, w, turned = node.args[x_at], *_matrix(node.args[w_at])
    if w is None or not isinstance(x, fx.Node):
        return "both factors are activations"
    if w.target in state.mutated:
        return "the matrix is a buffer that the model writes to"
    if len(shape(w) or ()) != 2 or len(shape(x) or ()) < 2 or not val(w).is_floating_point():
        return "the constant factor is not a float matrix"
    if x.op == "get_attr" or _matrix(x)[0] is not None:
        return "both factors are constants"
    bias: Any = None if b_at is None else node.args[b_at]
    if bias is not None:
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return "addmm with alpha or beta"
        rows = shape(w)[0 if turned else 1]  # type: ignore[index]
        if not isinstance(bias, fx.Node) or shape(bias) != (rows,) or dtype(bias) != dtype(w):
            return "the addend is not a bias vector"
    if state.trainable and not turned:
        return "the matrix is trained, and a transposed copy of it would not be"
    if not take_fuel():
        return ""
    weight = w if turned else insert_get_attr(gm, node, _transpose(state, w))
    new = insert_call(gm, aten.linear.default, (x, weight, bias), before=node, like=node)
    if (pattern := pattern_of(node)) is not None:
        inc_meta(new)["was"] = pattern.name  # rules that name this type still apply
    replace_uses(node, new)
    return None


def _matrix(node: Any) -> tuple[fx.Node | None, bool]:
    """(constant, whether it is read transposed); (None, False) if `node` is no constant matrix."""
    if not isinstance(node, fx.Node):
        return None, False
    if node.op == "get_attr":
        return node, False
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.op != "get_attr" or len(shape(source) or ()) != 2:
        return None, False
    return (source, True) if _swaps(node) else (None, False)


def _swaps(node: fx.Node) -> bool:
    """Whether a view of a matrix is its transpose."""
    dims: Any = node.args[1] if node.target is aten.permute.default else node.args[1:3]
    if node.target is aten.transpose.int:
        return sorted(d % 2 for d in dims) == [0, 1]
    return node.target is aten.t.default or (node.target is aten.permute.default and [d % 2 for d in dims] == [1, 0])


def _transpose(state: _State, w: fx.Node) -> str:
    tensor = get_tensor(state.gm, w).detach()
    key = (storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
    if key not in state.transposed:
        state.transposed[key] = set_tensor(state.gm, f"{w.target}_t", tensor.t().contiguous())
    return state.transposed[key]


def _fold_pad(node: fx.Node, dims: int) -> str | None:
    pad: Any = node.args[0]
    if pad.target is not aten.pad.default:
        return ""
    if argument(pad, 2) != "constant" or argument(pad, 3) not in (None, 0, 0.0):
        return "the padding before it is not with zeros"
    widths = list(pad.args[1]) + [0] * (2 * dims - len(pad.args[1]))
    pairs = [(widths[2 * i], widths[2 * i + 1]) for i in range(dims)][::-1]  # pad counts from the last dimension
    if any(widths[2 * dims :]) or any(not isinstance(a, int) or a != b or a < 0 for a, b in pairs):
        return "the padding before it differs from side to side"
    if not take_fuel():
        return ""
    own: Any = argument(node, 4)
    own = list(own) if isinstance(own, list | tuple) else [own]
    own = own * dims if len(own) == 1 else own
    set_arguments(node, {0: pad.args[0], 4: [p + a for p, (a, _) in zip(own, pairs, strict=True)]})
    return None


# --------------------------------------------------------------------------------- activation functions written out
_X = Anything("x")
_PLUS3 = P(aten.add.Tensor, _X, 3, alpha=1)
_RELU6 = Or(P(aten.relu6.default, _PLUS3), P((aten.hardtanh.default, aten.clamp.default), _PLUS3, 0, 6))
_GATE = Or(P(aten.hardsigmoid.default, _X), P(aten.div.Tensor, _RELU6, 6))


def _times(*gate: Any) -> P:
    return P(aten.mul.Tensor, _X, *gate, commutative=True)


def _rule(name: str, pattern: P, target: Any) -> Rule:
    def check(m: Match) -> str | None:
        good = isinstance(m["x"], fx.Node) and is_float(m["x"]) and dtype(m["x"]) == dtype(m.root)
        return None if good else "its input is not floating point"

    def rewrite(gm: fx.GraphModule, m: Match) -> None:
        replace_uses(m.root, insert_call(gm, target, (m["x"],), before=m.root, like=m.root))

    return Rule(name, pattern, rewrite, check)


_RULES = (
    _rule("silu", _times(P(aten.sigmoid.default, _X)), aten.silu.default),
    _rule("hardswish", _times(_GATE), aten.hardswish.default),
    _rule("hardswish of a quotient", P(aten.div.Tensor, _times(_RELU6), 6), aten.hardswish.default),
)
