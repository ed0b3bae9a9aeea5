"""Decide which values are quantized, and who reads them quantized. Changes nothing but annotations.

What is written into `meta["custom"]["inc"]`:
    on a value        quant   {key: {spec, algorithm, group}}    formats in which somebody reads it
    on a reader       reads   {name of the value: key}           which inputs it reads quantized
                      op      pattern name;  rule  index of the recipe's rule
                      weight  {spec, algorithm} for a layer with a weight
                      half    "bfloat16" or "float16", in the place of all of these: see `mixed_precision`
    on a float op     float   the reason

Readers are chosen from the outputs backwards: anchors (convolution, linear) first; a follower (add) joins if somebody
reads its result quantized, all others are sums themselves, and its backend can fuse it; a carrier (view, max_pool)
passes the wish of its readers on to its input, with the same scale. A value that a fused producer hands to a follower
(conv -> add) stays in the accumulator: it is not quantized. What is quantized dynamically is quantized where it is
read: to followers and carriers such a reader is a float one. Masks, positions and constants are told from data by
`_eligible` and never quantized, unless a rule names their reader.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from inc_graph.errors import ConfigError, IncWarning, UnusedRuleWarning
from inc_graph.graph import inc_meta, is_float, module_path, peek_meta, set_level
from inc_graph.oppattern import OpPattern, named, pattern_of
from inc_graph.passes._eligible import DATA, PARAMETER, Facts, useless, weight_spec
from inc_graph.passes._precision import FLOAT, class_of
from inc_graph.passmanager import Pass, PassReport, PassResult
from inc_graph.recipe import HALF_DTYPES, ONE_LAYER, OpQuant, Recipe, get_recipe, in_vain
from inc_graph.registry import PASSES, PATTERNS
from inc_graph.spec import PerTensor, QSpec

Key = tuple[str, str]  # text of the QSpec, algorithm: values read under one key share their scale


@dataclass
class _State:
    """What is known while walking backwards."""

    recipe: Recipe
    facts: Facts
    wants: dict[fx.Node, dict[Key, QSpec]] = field(default_factory=dict)  # value -> formats wanted
    reads: dict[fx.Node, dict[fx.Node, Key]] = field(default_factory=dict)  # reader -> value -> format
    group: dict[tuple[fx.Node, Key], tuple[fx.Node, Key]] = field(default_factory=dict)  # union-find
    ops: dict[fx.Node, tuple[OpPattern, int, OpQuant]] = field(default_factory=dict)
    halves: dict[fx.Node, tuple[OpPattern, int]] = field(default_factory=dict)
    float_: dict[fx.Node, str] = field(default_factory=dict)
    refused: dict[int, tuple[fx.Node, str]] = field(default_factory=dict)  # rule by name -> whom it cannot quantize
    sums: set[fx.Node] = field(default_factory=set)  # sums and products, and float chains that end in nothing else

    def root(self, item: tuple[fx.Node, Key]) -> tuple[fx.Node, Key]:
        while self.group.get(item, item) != item:
            self.group[item] = self.group.get(self.group[item], self.group[item])
            item = self.group[item]
        return item

    def reads_of(self, value: fx.Node) -> dict[fx.Node, Key | None]:
        """User -> the static format that it reads `value` in; None for who reads it float, or quantizes it itself."""
        found = {u: self.reads.get(u, {}).get(value) for u in value.users}
        return {u: None if k is None or self.wants[value][k].dynamic else k for u, k in found.items()}

    def want(self, reader: fx.Node, value: fx.Node, key: Key, spec: QSpec) -> None:
        self.wants.setdefault(value, {})[key] = spec
        self.reads.setdefault(reader, {})[value] = key


@PASSES.register("annotate")
@dataclass(frozen=True)
class Annotate(Pass):
    """Write the decisions of the graph's recipe as annotations."""

    name: ClassVar[str] = "annotate"
    requires: ClassVar[str] = "float"
    ensures: ClassVar[str] = "annotated"

    def run(self, gm: fx.GraphModule) -> PassResult:
        state = _State(get_recipe(gm), Facts(gm))
        for node in gm.graph.nodes:
            if (pattern := pattern_of(node)) is not None and pattern.role == "anchor":
                _anchor(node, pattern, state)
        _served(gm, state)
        for node in reversed(gm.graph.nodes):
            _reader(node, state)
            if _leads_to_sums(node, state):
                state.sums.add(node)
        _write(gm, state)
        _say_unused(gm, state.recipe)
        set_level(gm, "annotated")
        matched = [n.name for n in gm.graph.nodes if n in state.ops]
        return PassResult(gm, True, PassReport(matched, [(n.name, r) for n, r in state.float_.items()]))


# ------------------------------------------------------------------------------------------------------- who takes part
def _rule(node: fx.Node, pattern: OpPattern, state: _State) -> tuple[int, OpQuant] | str:
    found = state.recipe.resolve(node, pattern)
    if (reason := state.recipe.why_float(None if found is None else found[0])) is not None or found is None:
        return reason or ""
    index, rule = found
    supported = state.recipe.supported
    if supported is not None and rule.where.kind == "all" and rule.half is None:
        if pattern.name not in supported:
            return f"backend '{state.recipe.backend}' has no quantized kernel for {pattern.name}"
        if pattern.weight is None and rule.what.activation is not None and rule.what.activation.dynamic:
            return "two activations that are quantized at run time; asked for by its name it is"
    return index, rule.what


def _named(index: int, state: _State) -> bool:
    return state.recipe.rules[index].where.kind == "name"


def _anchor(node: fx.Node, pattern: OpPattern, state: _State) -> None:
    rule = _rule(node, pattern, state)
    if isinstance(rule, str):
        state.float_[node] = rule
        return
    index, what = rule
    if what.half is not None:
        if (reason := state.facts.bad_half(pattern, node, HALF_DTYPES[what.half])) is not None:
            state.float_[node] = reason
        else:
            state.halves[node] = pattern, index
        return
    reason = (
        pattern.check(node)
        or useless(pattern, what)
        or state.facts.bad_inputs(pattern, node, what.activation, _named(index, state))
        or state.facts.bad_weight(pattern, node, what.weight)
    )
    if reason and what.activation is None:
        # nobody would look for what is missing: a weight-only method has no neighbours that it could depend on
        asked = state.recipe.rules[index].origin.startswith("set_local(") and _named(index, state)
        if "NaN" in reason or (asked and state.recipe.rules[index].where.fit(named(node, pattern)) == "path"):
            raise _refused(node, reason)
        if asked:
            state.refused.setdefault(index, (node, reason))
    if reason:
        state.float_[node] = reason
    else:
        state.ops[node] = (pattern, index, what)


def _refused(node: fx.Node, reason: str) -> ConfigError:
    hint = "take it out of set_local, or leave it float with dtype='fp32'"
    if "NaN" in reason:  # whatever rule would quantize it
        where = repr(module_path(node) or node.name)
        hint = f"repair the weight, or leave the layer float with set_local({where}, config) and dtype='fp32' in it"
    return ConfigError(f"this operator cannot be quantized: {reason}", node=node, module=module_path(node), hint=hint)


def _served(gm: fx.GraphModule, state: _State) -> None:
    """ConfigError for a setting by a part of names that gives nothing at all its format.

    If it serves others (a prefix that an embedding, too, begins with), the report says who stays float. A graph that is
    one layer of a model does not know: whoever put it there asks.
    """
    taken = {index for _, index, _ in state.ops.values()}
    for index, (node, reason) in state.refused.items():
        if index not in taken and not gm.meta.get(ONE_LAYER):
            raise _refused(node, reason)


def _reader(node: fx.Node, state: _State) -> None:
    pattern = pattern_of(node)
    if node in state.ops:
        pattern, _, what = state.ops[node]
        if what.activation is not None:
            key = (str(what.activation), what.act_algorithm)
            for value in pattern.activations(node):
                state.want(node, value, key, what.activation)
    elif pattern is None or node in state.float_ or node in state.halves:
        return
    elif pattern.role == "follower":
        _follower(node, pattern, state)
    elif pattern.role == "carrier":
        _carrier(node, pattern, state)


def _reader_keys(node: fx.Node, state: _State) -> set[Key | None]:
    """The formats in which the users of `node` read it; None stands for float, and for no reader at all."""
    return set(state.reads_of(node).values()) or {None}


def _end(node: fx.Node) -> fx.Node:
    """`node`, or the activation function that is its only user."""
    if len(node.users) == 1:
        (user,) = node.users
        if (pattern := pattern_of(user)) is not None and pattern.role == "activation":
            return user
    return node


def _leads_to_sums(node: fx.Node, state: _State) -> bool:
    """True for a sum or product of two tensors, and for what moves or activates values for such alone."""
    if (pattern := pattern_of(node)) is None or pattern.check(node) is not None:
        return False
    if pattern.role == "follower":
        return len(pattern.inputs) > 1
    if pattern.role not in ("carrier", "activation") or node in state.wants:
        return False
    return bool(node.users) and all(u in state.sums for u in node.users)


def _follower(node: fx.Node, pattern: OpPattern, state: _State) -> None:
    end = _end(node)
    if (why := pattern.check(node)) is not None:
        state.float_[node] = why
        return
    key, others = _agreed(end, state)
    if key is None:
        codes = any(r.what is not None and r.what.half is None for r in state.recipe.rules)
        beside = "not every reader of its result is quantized, so int8 would only add conversions"
        state.float_[node] = beside if codes else "its neighbours compute in float32"
        return
    rule = _rule(node, pattern, state)
    if isinstance(rule, str):
        state.float_[node] = rule
        return
    index, what = rule
    if what.half is not None:
        state.float_[node] = "the rule gives it half precision, not codes"
        return
    inputs = list(pattern.activations(node))
    reason = state.facts.bad_inputs(pattern, node, what.activation, _named(index, state))
    if what.activation is None:
        reason = "the rule quantizes weights only"
    elif what.activation.dynamic:
        reason = "a sum or product gains nothing from inputs that are quantized at run time"
    elif reason is None and any(state.facts.kinds.get(v) == PARAMETER for v in inputs):
        reason = "one operand is a parameter"
    absorbed = _absorbed(inputs, state)
    unasked = state.recipe.supported is not None and state.recipe.rules[index].where.kind == "all"
    if reason is None and unasked and len(inputs) > 1 and absorbed is None:
        reason = "no operand comes straight from a quantized layer that could absorb it"
    if reason is not None or what.activation is None:
        state.float_[node] = str(reason)
        return
    state.ops[node] = (pattern, index, what)
    own = (str(what.activation), what.act_algorithm)
    for value in inputs:
        if value is not absorbed:
            state.want(node, value, own, what.activation)
    for user in others:
        state.want(user, end, key, state.wants[end][key])


def _agreed(value: fx.Node, state: _State) -> tuple[Key | None, list[fx.Node]]:
    """A format that somebody reads `value` in, and the float sums that are to read it so too; None if others read it.

    A float sum reads the codes of another one through a dequantize. If it took the float value, the sum before it had a
    float reader, so it would be float as well, and so on up the whole chain of residual blocks.
    """
    keys = state.reads_of(value)
    others = [u for u, key in keys.items() if key is None]
    if not all(u in state.sums for u in others):
        return None, []
    return next((key for key in keys.values() if key is not None), None), others


def _absorbed(inputs: list[fx.Node], state: _State) -> fx.Node | None:
    """The operand that stays in the accumulator of its layer: that of the later layer, as it runs last."""
    layers = [v for v in inputs if v in state.ops and len(v.users) == 1 and state.ops[v][0].weight is not None]
    layers = [v for v in layers if (a := state.ops[v][2].activation) is not None and not a.dynamic]
    layers = [v for v in layers if state.ops[v][0].inputs]
    return max(layers) if layers and len(inputs) > 1 else None


def _carrier(node: fx.Node, pattern: OpPattern, state: _State) -> None:
    found = state.recipe.resolve(node, pattern)
    keys = _reader_keys(node, state)
    one = len(keys - {None}) == 1 and (None not in keys or _from_sum(node))
    key, others = _agreed(node, state) if one else (None, [])
    if found is not None and found[1].what is None and found[1].where.kind != "all":
        state.float_[node] = f"kept float by {found[1].origin or found[1].where}"
    elif key is None:
        _stays(node, "its readers want different formats" if None not in keys else _FLOAT_READER, state)
    elif _carry(node, pattern, key, state):
        for user in others:
            state.want(user, node, key, state.wants[node][key])


_FLOAT_READER = "not every reader of what it moves is quantized"


def _from_sum(node: Any) -> bool:
    """True for what a sum gives, also through moves and activation functions of it alone."""
    while isinstance(node, fx.Node) and (pattern := pattern_of(node)) is not None:
        if pattern.role not in ("carrier", "activation"):
            return pattern.role == "follower" and len(pattern.inputs) > 1
        node = _producer(node)
    return False


def _carry(node: fx.Node, pattern: OpPattern, key: Key, state: _State) -> bool:
    spec = state.wants[node][key]
    per_tensor = isinstance(spec.granularity, PerTensor)  # no other scale survives moving elements around
    why = None if per_tensor else "its readers want more than one scale for the tensor"
    if (reason := pattern.check(node) or why or state.facts.bad_inputs(pattern, node, spec)) is not None:
        _stays(node, reason, state)
        return False
    for value in pattern.activations(node):
        state.want(node, value, key, spec)
        a, b = state.root((node, key)), state.root((value, key))
        state.group[a] = b
        state.group.setdefault(b, b)
    return True


def _stays(node: fx.Node, reason: str, state: _State) -> None:
    """Note why a carrier is float, if that costs something: it copies data, which is four times as long as codes."""
    schema = getattr(node.target, "_schema", None)
    copies = schema is None or all(r.alias_info is None for r in schema.returns)
    if copies and is_float(node) and state.facts.kinds.get(node) == DATA:
        state.float_[node] = reason


# ------------------------------------------------------------------------------------------------------------- writing
def _write(gm: fx.GraphModule, state: _State) -> None:
    keys: dict[Key, str] = {}
    for value, formats in state.wants.items():
        quant = inc_meta(value).setdefault("quant", {})
        for key, spec in formats.items():
            root, _ = state.root((value, key))
            short = keys.setdefault(key, str(len(keys)))
            quant[short] = {"spec": spec.to_json(), "algorithm": key[1], "group": root.name}
    for reader, values in state.reads.items():
        inc_meta(reader)["reads"] = {v.name: keys[key] for v, key in values.items()}
        if reader not in state.ops and (pattern := pattern_of(reader)) is not None:
            inc_meta(reader)["op"] = pattern.name
    for node, (pattern, index, what) in state.ops.items():
        meta = inc_meta(node)
        meta["op"], meta["rule"] = pattern.name, index
        if pattern.weight is not None and what.weight is not None:
            spec = weight_spec(what.weight, pattern, node)
            meta["weight"] = {"spec": spec.to_json(), "algorithm": what.weight_algorithm}
            if what.bias_correction and pattern.bias is not None and what.activation is not None:
                meta["weight"]["correct_bias"] = True
    for node, (pattern, index) in state.halves.items():
        half = str(state.recipe.rules[index].half).removeprefix("torch.")
        inc_meta(node).update({"op": pattern.name, "rule": index, "half": half})
    for node in gm.graph.nodes:
        if node in state.float_ and node not in state.ops:
            inc_meta(node)["float"] = state.float_[node]
        elif node.op == "call_function" and node not in state.ops and node not in state.halves:
            if (reason := _why_float(node, state)) is not None:
                inc_meta(node)["float"] = reason


def _why_float(node: fx.Node, state: _State) -> str | None:
    """Reason for an operator that no rule could have taken; None for what is not worth a line in a report."""
    pattern = pattern_of(node)
    if not is_float(node) and pattern is None:
        return None
    if state.recipe.method == "mixed_precision" and (kept := class_of(node))[0] == FLOAT:
        return kept[1]
    if pattern is None:
        computes = getattr(node.target, "namespace", None) is not None
        return "no quantization pattern for this operator" if computes else None
    if pattern.role == "opaque":
        return str(peek_meta(node).get("whole", pattern.reason))
    if pattern.role == "activation" and is_float(node) and (node in state.reads or _producer(node) not in state.ops):
        return "what it stands behind is not quantized"
    return None  # a view costs nothing; an activation function goes with the layer before it


def _producer(node: fx.Node) -> Any:
    return node.args[0] if node.args else None


def _say_unused(gm: fx.GraphModule, recipe: Recipe) -> None:
    """Warn of every rule that speaks of no operator of the graph, of none that can be set by itself, or in vain."""
    nodes = [(n, p) for n in gm.graph.nodes if (p := pattern_of(n)) is not None]
    dead, twice = in_vain(recipe.rules, [named(n, p) for n, p in nodes if p.role in ("anchor", "follower")])
    for text in dead:
        warnings.warn(text, UnusedRuleWarning, stacklevel=2)
    for text in twice:
        warnings.warn(text, IncWarning, stacklevel=2)
    mixed = any(r.half is not None for r in recipe.rules)  # an operator has its dtype by itself
    for rule in recipe.rules:
        if rule.where.kind in ("all", "implied"):
            continue
        roles = {p.role for n, p in nodes if rule.where.matches(n, p)}
        why = None if roles else "matched no operator of the model"
        if why and rule.where.kind == "name" and rule.where.value in PATTERNS:
            why += f" by its name; the type {rule.where.value} is meant by its class or function, such as torch.matmul"
        if roles == {"activation"} and not (mixed and (rule.floats or rule.half is not None)):
            why = (
                "has no effect by itself: an activation function is part of the operator that produces its input; "
                "name that operator instead"
            )
        if why is not None:
            warnings.warn(f"{rule.origin or rule.where} {why}", UnusedRuleWarning, stacklevel=2)
