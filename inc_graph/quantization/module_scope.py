"""Module scope: a model that cannot be exported as a whole is quantized layer by layer.

Each layer (Linear, Conv*, Embedding, the Conv1D of HF transformers; LSTM and GRU where ranges are found at run time)
becomes a small captured graph in place, on which the same passes and lowerings run; the model keeps its class, its
methods and its Python control flow. Functional calls (`torch.matmul`, `+`) are not seen here.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from inc_graph.batches import no_batches, one_batch_a_call
from inc_graph.errors import CaptureError, ConfigError, IncWarning, UnusedRuleWarning
from inc_graph.graph import peek_meta
from inc_graph.oppattern import Named, pattern_of, pattern_of_module, types_of_module
from inc_graph.passmanager import Pipeline
from inc_graph.quantization import absorbing, block_inputs
from inc_graph.quantization.block_by_block import BlockByBlock, is_sequential
from inc_graph.quantization.block_inputs import BlockInputs, block_inputs_of, grams, stop_at_blocks
from inc_graph.quantization.captures import Captures
from inc_graph.quantization.finish import finish, no_data, observers_of, warn_of_weights
from inc_graph.quantization.layers import call_every_layer, keep_report, leaves, own_copy, put
from inc_graph.quantization.leaf import Leaf, form_of, is_layer, is_recurrent, unfit
from inc_graph.quantization.left_float import left_in_modules, warn_of_left
from inc_graph.quantization.model import QuantizedModel
from inc_graph.quantization.names import warn_prefixes
from inc_graph.quantization.pickling import refuse_pickling
from inc_graph.quantization.precision import all_float, nothing_done
from inc_graph.quantization.served import Served
from inc_graph.quantization.streaming import (
    Filled,
    Source,
    checkpoint_for,
    filled,
    float_layer,
    held,
    read_rest,
    stream,
)
from inc_graph.quantization.tied import keep_unpacked, share_codes, tied_layers
from inc_graph.recipe import ONE_LAYER, Recipe, WhereRule, decide, in_vain, set_recipe
from inc_graph.report import OpLine, Report, attribute_bytes, read_graph
from inc_graph.smoothing import Smoothing
from inc_graph.utils.device import choose_backend
from inc_graph.utils.progress import progress

__all__ = ["convert", "is_prepared", "look", "prepare", "undo"]

_MARK = "_inc_module_scope"
_NO_LAYER = "it has no Linear, Conv or Embedding"
_NO_CALL = "the model was not called, nor a module in it that calls {} and all blocks behind it"
_NOTE = "quantized layer by layer: operators outside Linear, Conv and Embedding modules were not looked at"


@dataclass
class _Facts:
    """What prepare leaves on the model for convert and undo."""

    recipe: Recipe
    floats: list[OpLine]
    bytes_before: int
    timings: Counter[str] = field(default_factory=Counter)
    flags: list[tuple[nn.Module, str, Any]] = field(default_factory=list)  # (module, attribute, value before)
    rest: list[Filled] = field(default_factory=list)  # what was read from a checkpoint, outside of its layers


def prepare(model: nn.Module, recipe: Recipe, inplace: bool, model_path: str = "") -> nn.Module:
    """Replace each layer that the recipe quantizes by its observed graph. All or nothing.

    A model that is one layer itself cannot become another object: it gives a `Leaf` and stays as it is. Parameters
    without values are read from the checkpoint at `model_path` (see `streaming`).

    Raises:
        ConfigError: if no layer is quantized; with the reasons.
        CaptureError: if the model cannot be copied (`inplace=False`).
    """
    if not inplace:
        model = own_copy(model)
    source = checkpoint_for(model, model_path)
    facts = _Facts(recipe, [], attribute_bytes(model))
    plan = _plan(model, facts, source)
    if not any(new is not None for _, new in plan) and not all_float(recipe):
        reasons = "; ".join(dict.fromkeys(f"{f.op}: {f.detail}" for f in facts.floats)) or _NO_LAYER
        hint = "give example_inputs, so that functional operators are seen, or change the config"
        if isinstance(model, fx.GraphModule):
            hint = "give example_inputs, or the ExportedProgram itself: in a graph the operators are functions"
        raise ConfigError(f"{nothing_done(recipe)} ({reasons})", hint=hint)
    facts.floats += [
        OpLine(path, path, type(module).__name__, "only Linear, Conv and Embedding are quantized layer by layer")
        for path, module in model.named_modules()
        if not _takes(module, recipe)
        and module._parameters
        and not isinstance(module, nn.ParameterList | nn.ParameterDict)
    ]
    if source is not None:
        facts.rest = read_rest(model, source, [path for paths, new in plan if new is not None for path in paths])
    for paths, new in plan:
        model = put(model, paths, new)
    for tensor in facts.rest:
        tensor.put(tensor.value)
    facts.flags = call_every_layer(model)
    model.__dict__[_MARK] = facts
    one_batch_a_call(model)
    stop_at_blocks(model, leaves(model))
    absorbing.watch(model, leaves(model))
    return model


# ------------------------------------------------------------------------------------------------------------ prepare
def look(model: nn.Module, recipe: Recipe) -> tuple[list[tuple[list[str], Leaf | None]], list[OpLine]]:
    """(paths, leaf) of every layer, and what stays float; the model is not changed."""
    facts = _Facts(recipe, [], 0)
    return _plan(model, facts, None), facts.floats


def _plan(model: nn.Module, facts: _Facts, source: Source | None) -> list[tuple[list[str], Leaf | None]]:
    """(paths, leaf) of every layer; nothing is changed. What stays float goes into `facts.floats`."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _takes(module, facts.recipe):
            paths.setdefault(module, []).append(path)
    captures, matched, served, plan = Captures(), set[int](), Served(facts.recipe), []
    with warnings.catch_warnings(), progress("prepare", len(paths)) as step:
        warnings.simplefilter("ignore", UnusedRuleWarning)  # each small graph would warn of rules for the others
        for module, names in paths.items():
            step(names[0])
            leaf = _leaf(model, filled(module, source), names, captures, facts, matched, served)
            if leaf is not None and leaf.original is not module and source is not None:
                stream(leaf, source, module)
            plan.append((names, leaf))
    served.check()
    for i, rule in enumerate(facts.recipe.rules):
        if rule.where.kind not in ("all", "implied") and i not in matched:
            message = f"{rule.origin or rule.where} matched no operator of the model"
            warnings.warn(message, UnusedRuleWarning, stacklevel=5)
    operators = [op for m, names in paths.items() for op in _named(m, names)]
    dead, twice = in_vain(facts.recipe.rules, operators)
    for text in dead:
        warnings.warn(text, UnusedRuleWarning, stacklevel=5)
    for text in twice:
        warnings.warn(text, IncWarning, stacklevel=5)
    warn_prefixes(facts.recipe, [p for names in paths.values() for p in names], stacklevel=6)
    return plan


def _takes(module: nn.Module, recipe: Recipe) -> bool:
    """Whether a module is looked at: a layer, or one that a pass of the recipe takes apart."""
    return is_layer(module) or (is_recurrent(module) and "split-recurrent" in recipe.prepare.split(","))


def _leaf(
    model: nn.Module,
    module: nn.Module,
    names: list[str],
    captures: Captures,
    facts: _Facts,
    matched: set[int],
    served: Served | None = None,
) -> Leaf | None:
    served = Served(facts.recipe) if served is None else served
    parent = model.get_submodule(names[0].rpartition(".")[0]) if names[0] else None
    kind = type(module).__name__
    if (reason := unfit(module, parent)) is not None:
        facts.floats.append(OpLine(names[0], names[0], kind, reason))
        spoken = _rules_by_name(_named(module, names), facts.recipe)
        matched.update(spoken)
        served.refused(_named(module, names), reason, spoken)
        return None
    if (by_name := _float_by_name(module, names, facts.recipe)) is not None:
        op, reason, spoken = by_name
        facts.floats.append(OpLine(names[0], names[0], op, reason))
        matched.update(spoken)
        return None
    form, examples, dims = form_of(module)
    try:
        gm = captures.get(module, names[0], examples, dims)
    except CaptureError as e:
        facts.floats.append(OpLine(names[0], names[0], kind, f"it cannot be captured: {e.message}"))
        warnings.warn(f"layer {names[0]!r} stays float: {e}", IncWarning, stacklevel=6)
        return None
    rules = facts.recipe.rules
    found = {name: _rules_for(gm, name, module, rules) for name in names}
    matched.update(*found.values())
    # a layer that is used under several names goes by the first one that a rule speaks of
    chosen = next((n for n in names if any(rules[i].where.kind == "name" for i in found[n])), names[0])
    _rules_for(gm, chosen, module, rules)
    set_recipe(gm, facts.recipe)
    gm.meta[ONE_LAYER] = True
    result = Pipeline.parse(facts.recipe.prepare).run(gm)
    result.graph.meta.pop(ONE_LAYER)
    for done, seconds in result.timings:
        facts.timings[done] += seconds  # type: ignore[assignment]
    quantized, floats = read_graph(result.graph)
    facts.floats += [f for f in floats if f.op != "cat" or not is_recurrent(module)]  # its states, put together
    own = _named(module, [chosen])
    if not quantized:
        served.refused(own, "; ".join(dict.fromkeys(f.detail for f in floats)))
        return None
    served.taken(own)
    result.graph.meta["inc"]["bytes_before"] = attribute_bytes(module)
    refuse_pickling(result.graph)
    return Leaf(result.graph, form, names[0], module)


def _float_by_name(module: nn.Module, names: list[str], recipe: Recipe) -> tuple[str, str, set[int]] | None:
    """(operator type, reason, rules that speak of it) of a layer that stays float whatever is in it: it is not even
    captured. None if it may be quantized."""
    pattern = pattern_of_module(type(module))
    operators = _named(module, names)
    reasons = [recipe.why_float(decide(recipe.rules, op)) for op in operators]
    if pattern is None or not all(reasons):
        return None
    return pattern.name, str(reasons[0]), _rules_by_name(operators, recipe)


def _named(module: nn.Module, names: list[str]) -> list[Named]:
    """A layer as rules know it, under each of its names."""
    types = types_of_module(type(module))
    return [Named(name, name, types, True) for name in names]


def _rules_by_name(operators: list[Named], recipe: Recipe) -> set[int]:
    """The indices of the rules that speak of one of the operators."""
    return {i for i, rule in enumerate(recipe.rules) if any(rule.where.fit(op) is not None for op in operators)}


def _rules_for(gm: fx.GraphModule, name: str, module: nn.Module, rules: tuple[WhereRule, ...]) -> set[int]:
    """Give the graph's operators the path `name`; the indices of the rules that speak of one of them."""
    stack = {name: (name, type(module))}
    for node in gm.graph.nodes:
        node.meta["nn_module_stack"] = stack
    nodes = [(n, p) for n in gm.graph.nodes if (p := pattern_of(n)) is not None]
    return {i for i, rule in enumerate(rules) if any(rule.where.matches(n, p) for n, p in nodes)}


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` has replaced layers of this model."""
    return _MARK in model.__dict__


def undo(model: nn.Module) -> nn.Module:
    """Put the float layers back: the model as it was before `prepare`."""
    facts: _Facts = model.__dict__.pop(_MARK)
    block_inputs.undo(model)
    no_batches(model)
    absorbing.forget(model)
    for leaf, paths in leaves(model).items():
        model = put(model, paths, leaf.original)
    for tensor in facts.rest:
        tensor.put(tensor.empty)
    for module, name, value in facts.flags:
        setattr(module, name, value)
    return model


# ------------------------------------------------------------------------------------------------------------ convert
def _in_float(stopped: BlockInputs | None, found: dict[Leaf, list[str]]) -> list[str]:
    """A note if layers are rounded on what the float layers before them give."""
    asking = [leaf for leaf in found if grams(leaf)]
    if not asking or (stopped is not None and stopped.chain == ""):
        return []
    note = "layers were rounded on their inputs in the float model"
    if stopped is not None:
        note += f", not block by block: {stopped.chain or _NO_CALL.format(stopped.paths[0])}"
    elif len(asking) > 1 or any(map(is_sequential, asking)):
        note += ": no list of several modules of one class, as the blocks of a language model, holds most of them"
    else:
        return []
    return [f"{note}; true_sequential=True had no effect" if any(map(is_sequential, asking)) else note]


def convert(model: nn.Module, backend: str | None, inplace: bool) -> nn.Module:
    """Convert and lower each leaf. A leaf that no calibration data reached stays float, and the report says so.

    Raises:
        CalibrationError: if no leaf saw data.
    """
    found = leaves(model)
    if found and all(isinstance(leaf.inner, QuantizedModel) for leaf in found):
        raise ConfigError("the model is converted already", hint="give the float model, or the result of prepare")
    facts: _Facts = model.__dict__[_MARK]
    captures = Captures()

    def again(leaf: Leaf) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusedRuleWarning)  # of rules for the other layers, as in prepare
            made = _leaf(model, leaf.original, found[leaf], captures, _Facts(facts.recipe, [], 0), set())  # type: ignore[arg-type]
        assert made is not None
        return made.inner

    with absorbing.absorbing(model, found, facts.recipe, again, inplace) as notes:
        if notes:
            _warn_of_folding(found, notes[0])
        left = left_in_modules(model, found, facts.floats)
        made, report = _convert(model, found, facts, backend, inplace, notes)
    warn_of_weights(report)
    warn_of_left(left, facts.recipe, report)
    return made


def _warn_of_folding(found: dict[Leaf, list[str]], why: str) -> None:
    """Name layers that are not smoothed, as nobody is known who could take the scale in."""
    names = []
    for leaf, paths in found.items():
        notes = [s for n in leaf.inner.graph.nodes if (s := peek_meta(n).get("smooth")) is not None]  # type: ignore[union-attr]
        names += [paths[0]] if any(Smoothing.parse(s["how"]).folding and "line" not in s for s in notes) else []
    if names:
        text = f"SmoothQuant with folding=True smooths nothing layer by layer: {', '.join(names[:4])}"
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        warnings.warn(f"{text}{more}; {why}; folding=False multiplies inputs instead", IncWarning, stacklevel=4)


def _convert(
    model: nn.Module, found: dict[Leaf, list[str]], facts: _Facts, backend: str | None, inplace: bool, notes: list[str]
) -> tuple[nn.Module, Report]:
    stopped = block_inputs_of(model)
    blocks = BlockByBlock(model, stopped, found) if stopped is not None and stopped.calls else None
    watched = {leaf: observers_of(leaf) for leaf in found}
    tied = tied_layers(model)
    keep_unpacked(tied)
    if blocks is None and any(watched.values()) and not any(o.elements for os in watched.values() for o in os):
        raise no_data()
    name, _ = choose_backend(backend or facts.recipe.backend)  # said even if every layer stays float
    report = Report(
        facts.recipe.method, name, floats=list(facts.floats), bytes_before=facts.bytes_before, notes=[_NOTE, *notes]
    )
    report.notes += _in_float(stopped, found)
    timings = Counter(facts.timings)
    new: dict[Leaf, nn.Module] = {}
    missing: list[str] = []
    with progress("convert", len(found)) as step, contextlib.closing(blocks) if blocks else contextlib.nullcontext():
        for leaf in found if blocks is None else blocks.order():
            step(leaf.path)
            start = time.perf_counter()
            if blocks is not None:
                blocks.before(leaf)
            reason = leaf.reason
            if reason is None and not all(o.elements for o in watched[leaf]):
                reason = "no calibration data reached it: it was never called, or only with empty inputs"
                missing.append(leaf.path)
            timings["calibrate"] += time.perf_counter() - start  # type: ignore[assignment]
            if reason is not None:
                new[leaf] = float_layer(leaf)
                report.floats += [OpLine(x.name, leaf.path, x.op, reason) for x in read_graph(leaf.inner)[0]]  # type: ignore[arg-type]
                continue
            with held(leaf):
                part = finish(leaf.inner, backend, show=False)  # type: ignore[arg-type]
            new[leaf] = converted = leaf.converted(part)
            if blocks is not None:
                blocks.after(leaf, converted)
            report.backend = part.report.backend
            report.kernels += part.report.kernels
            lines = part.report.recipe
            report.recipe = lines if report.recipe is None else report.recipe + lines
            report.reference += part.report.reference
            report.weights += part.report.weights
            report.smoothing += [line for line in part.report.smoothing if line not in report.smoothing]
            for name, seconds in part.report.timings:
                timings[name] += seconds  # type: ignore[assignment]
    report.notes += blocks.notes() if blocks is not None else []
    report.notes += share_codes(tied, new)
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.warn(
            f"{len(missing)} layers saw no calibration data and stay float: {shown}", IncWarning, stacklevel=4
        )
    if inplace:
        for leaf, paths in found.items():
            model = put(model, paths, new[leaf])
    else:
        memo: dict[int, Any] = {}
        for leaf, module in new.items():  # the copy gets the new module where it would copy the leaf
            memo[id(leaf)] = copy.deepcopy(module, memo) if module is leaf.original else module
        model = copy.deepcopy(model, memo)
    model.__dict__.pop(_MARK, None)
    block_inputs.undo(model)
    no_batches(model)
    absorbing.forget(model)
    report.timings = list(timings.items())
    report.bytes_after = attribute_bytes(model)
    keep_report(model, report)
    return model, report
