"""SmoothQuant of a model that is quantized layer by layer: norms and layers before them take the scales in.

A layer by itself knows nobody who could. So the float model is exported on its first calibration call - if that cannot
be, each of its blocks is - and `absorb-scales` finds who can, with what the layers' own observers have seen. What it
finds is done to the parameters of the model: the weights of norms, the rows and columns of layers; layers get their
small graphs anew, with what they have seen divided by the scale. Inputs that nobody takes the scale of are multiplied,
as they are without an export.

The exported model is what one call has made of it. So nothing is done in a block some of whose parameters that call
did not read, and the model is run on the call once more: if its results are not what they were, nothing is done at all.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from inc_graph.capture import capture
from inc_graph.channel_stats import CALLS, ChannelObserver, Recalls
from inc_graph.errors import IncError
from inc_graph.graph import get_attr, inc_meta, module_path, peek_meta
from inc_graph.passmanager import Pipeline
from inc_graph.quantization.block_inputs import block_paths
from inc_graph.quantization.finish import observers_of
from inc_graph.quantization.first_call import first_call, forget_first_calls, keep_first_calls
from inc_graph.quantization.kept_calls import flat_inputs
from inc_graph.quantization.layers import put
from inc_graph.quantization.leaf import Leaf
from inc_graph.recipe import Recipe, set_recipe
from inc_graph.smoothing import ABSORBED, WHY, Absorbed

__all__ = ["absorbing", "forget", "watch"]

Leaves = dict[Leaf, list[str]]
_FOLDS = ("fold-constants", "fold-conv-bn")  # what they make is no parameter of the model
_BLOCK = re.compile(r"(.*?\.)?\d+(?=\.|$)")
_APART = {torch.float32: 1e-4, torch.float64: 1e-6}  # of what rounding moves; other dtypes are coarser
_COARSE = 5e-2


def watch(model: nn.Module, found: Leaves) -> None:
    """Let a prepared model keep what it has to be exported with, if inputs of layers are to be smoothed."""
    asking = {leaf: paths for leaf, paths in found.items() if _watcher(leaf) is not None}
    if asking and not any("" in paths for paths in asking.values()):
        keep_first_calls(model, ["", *(block_paths(model, asking) or [])])


def forget(model: nn.Module) -> None:
    """Undo `watch`."""
    forget_first_calls(model)


def _watcher(leaf: Leaf) -> ChannelObserver | None:
    found = [m for m in leaf.inner.modules() if isinstance(m, ChannelObserver)]
    return found[0] if len(found) == 1 else None


@dataclass
class _Changes:
    """What has been done to a model, and how it was before."""

    parameters: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    graphs: list[tuple[Leaf, nn.Module]] = field(default_factory=list)

    def set(self, owners: Iterable[tuple[nn.Module, str]], new: nn.Parameter) -> None:
        for owner, name in owners:
            self.parameters.append((owner, name, owner._parameters[name]))  # type: ignore[arg-type]
            owner._parameters[name] = new

    def undo(self) -> None:
        for owner, name, old in reversed(self.parameters):
            owner._parameters[name] = old
        for leaf, graph in reversed(self.graphs):
            leaf.inner = graph
        self.parameters, self.graphs = [], []


@contextlib.contextmanager
def absorbing(
    model: nn.Module, found: Leaves, recipe: Recipe, again: Callable[[Leaf], fx.GraphModule], keep: bool
) -> Iterator[list[str]]:
    """Within it, parameters of the model have taken scales in; gives what the report is to say.

    Args:
        found: The leaves of a prepared model.
        again: The observed graph of a leaf, made anew from its float layer.
        keep: Whether the model stays so afterwards, if nothing goes wrong. Else it is as it was.
    """
    changes, notes = _Changes(), list[str]()
    done = False
    try:
        if any(_watcher(leaf) is not None for leaf in found) and not any("" in paths for paths in found.values()):
            _absorb(model, found, recipe, again, changes, notes)
        yield notes
        done = True
    finally:
        if not (done and keep):
            changes.undo()


def _absorb(
    model: nn.Module, found: Leaves, recipe: Recipe, again: Callable[[Leaf], fx.GraphModule], changes: _Changes,
    notes: list[str],
) -> None:  # fmt: skip
    ready = {leaf: ps for leaf, ps in found.items() if _watcher(leaf) is not None and _has_data(leaf)}
    if not ready:
        return
    with _originals(model, found):
        looked, reason = _looked_at(model, ready, recipe)
        lines: dict[str, Absorbed] = {}
        why: dict[str, str] = {}
        for one in looked:
            own = _Changes()
            text = _apply(model, one, own)
            if text is None:
                changes.parameters += own.parameters
                lines.update({name: r for r in one.records for name in r.layers})
            else:
                own.undo()
                reason = reason or text
            why.update(one.why)
    if reason:
        notes.append(f"where nobody was found to take scales in, inputs are multiplied: {reason}")
    touched = {id(owner) for owner, _, _ in changes.parameters}
    for leaf, paths in found.items():
        record = next((lines[p] for p in paths if p in lines), None)
        text = next((why[p] for p in paths if p in why), reason)
        if record is not None or id(leaf.original) in touched or (leaf in ready and text):
            changes.graphs.append((leaf, leaf.inner))
            leaf.inner = _renewed(leaf.inner, again(leaf), record, text)  # type: ignore[arg-type]


def _has_data(leaf: Leaf) -> bool:
    return leaf.reason is None and all(o.elements for o in observers_of(leaf))


@contextlib.contextmanager
def _originals(model: nn.Module, found: Leaves) -> Iterator[None]:
    """The float model, for a while."""
    for leaf, paths in found.items():
        put(model, paths, leaf.original)
    try:
        yield
    finally:
        for leaf, paths in found.items():
            put(model, paths, leaf)


# ------------------------------------------------------------------------------------------------------- looking at it
@dataclass
class _Look:
    """What was found in an exported part of the model: scales that can be taken in, and for other layers why not."""

    path: str
    records: list[Absorbed]
    why: dict[str, str]

    def drop(self, group: tuple[str, ...], reason: str) -> None:
        """Do not scale these layers after all."""
        self.records = [r for r in self.records if r.together != group]
        self.why.update(dict.fromkeys(group, reason))

    def named(self, name: str) -> str:
        """The path in the model of something in the part."""
        return f"{self.path}.{name}" if self.path else name


def _looked_at(model: nn.Module, ready: Leaves, recipe: Recipe) -> tuple[list[_Look], str]:
    """What was found, in the whole model or in its blocks, and why there is no more."""
    if first_call(model) is None:
        reason = "the model itself was not called in calibration"
    else:
        found = _look(model, "", ready, recipe)
        if isinstance(found, _Look):
            return [found], ""
        reason = found
    looked = []
    for path in block_paths(model, ready) or []:
        if first_call(model.get_submodule(path)) is not None:
            found = _look(model, path, ready, recipe)
            if isinstance(found, _Look):
                looked.append(found)
            else:
                reason = found
    return looked, reason


def _look(model: nn.Module, path: str, ready: Leaves, recipe: Recipe) -> _Look | str:
    """What can be taken in within a module, or why it cannot be exported."""
    module = model.get_submodule(path)
    call = first_call(module)
    assert call is not None
    text = ",".join(str(p) for p in Pipeline.parse(recipe.prepare).passes if p.name not in _FOLDS)
    try:
        if any(p.is_meta for p in module.parameters()):
            raise IncError("some of its parameters have no values yet")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was worth saying was said of the layers
            gm = capture(module, *call)
            _name_in_model(gm, path)
            set_recipe(gm, replace(recipe, prepare=text))
            gm = Pipeline.parse(text).run(gm).graph
            why = _tell(gm, ready)
            gm.meta[CALLS] = Recalls([flat_inputs(gm, *call)], grams=False)
            gm = Pipeline.parse("absorb-scales").run(gm).graph
    except IncError as e:
        return f"{path or 'the model'} cannot be exported to look at it: {e.message.splitlines()[0]}"
    look = _Look(path, gm.meta[ABSORBED], {**gm.meta[WHY], **why})
    read = {id(get_attr(gm, str(n.target))) for n in gm.graph.find_nodes(op="get_attr")}
    blind = {_block(look.named(name)): name for name, p in module.named_parameters() if id(p) not in read}
    for record in look.records:
        places = [_block(p) for p in (*record.together, *record.line.takers, *map(look.named, record.factors))]
        unread = next((blind[place] for place in places if place in blind), None)
        if unread is not None:
            look.drop(record.together, f"the first call did not use {look.named(unread)}, which may read it at others")
        elif any(_parameter(module, name) is None for name in record.factors):
            look.drop(record.together, "who could take the scale in is no parameter")
    return look


def _block(path: str) -> str | None:
    match = _BLOCK.match(path)
    return None if match is None else match.group()


def _name_in_model(gm: fx.GraphModule, path: str) -> None:
    """Give operators of an exported part the paths that they have in the model."""
    if not path:
        return
    for node in gm.graph.nodes:
        own = module_path(node)
        frames = list((node.meta.get("nn_module_stack") or {}).values())
        if frames:
            name = f"{path}.{own}" if own else path
            node.meta["nn_module_stack"] = {name: (name, frames[-1][1])}


def _tell(gm: fx.GraphModule, ready: Leaves) -> dict[str, str]:
    """Give the channel observers of the exported model what those of the layers have seen. Gives the reasons of layers
    that are left to themselves, by path."""
    why: dict[str, str] = {}
    owner = {path: leaf for leaf, paths in ready.items() for path in paths}
    layers: dict[Leaf, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if "smooth" in peek_meta(node) and (leaf := owner.get(module_path(node))) is not None:
            layers.setdefault(leaf, []).append(node)
    seen: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if "smooth" not in peek_meta(node):
            continue
        notes, leaf = peek_meta(node)["smooth"], owner.get(module_path(node))
        observer = None if leaf is None or len(layers[leaf]) > 1 else _watcher(leaf)
        first = seen.setdefault(notes["watch"], None if observer is None else observer.snapshot())
        if leaf is not None and len(layers[leaf]) > 1:
            why[module_path(node)] = "the layer is called several times"
        elif first is None or observer is None or not _alike(first, observer.snapshot()):
            why[module_path(node)] = "others that read its input were not calibrated on the same data"
        if module_path(node) in why:
            del inc_meta(node)["smooth"]
    for name, state in seen.items():
        if state is not None:
            get_attr(gm, name).restore(state)
    return why


def _alike(a: Any, b: Any) -> bool:
    """Whether two observers have seen the same data."""
    if len(a.parts) != len(b.parts) or (a.calls, a.elements) != (b.calls, b.elements):
        return False
    pairs = zip((x for part in a.parts for x in part), (x for part in b.parts for x in part), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    parent, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(parent)._parameters.get(leaf)
    except AttributeError:
        return None


# -------------------------------------------------------------------------------------------------------- doing it
def _apply(model: nn.Module, look: _Look, changes: _Changes) -> str | None:
    """Scale parameters of a part of the model; why it must not be, if its results are others then."""
    module = model.get_submodule(look.path)
    within = {id(m) for m in module.modules()}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((owner, name))
    for record in look.records:
        tensors = [_parameter(module, name) for name in record.factors]
        if any(id(owner) not in within for p in tensors for owner, _ in owners[id(p)]):
            look.drop(record.together, "who could take the scale in has a parameter of another part of the model")
    factors: dict[int, tuple[nn.Parameter, list[Tensor]]] = {}
    for record in look.records:
        for name, factor in record.factors.items():
            taker: Any = _parameter(module, name)
            factors.setdefault(id(taker), (taker, []))[1].append(factor)
    if not factors:
        return None
    before = _results(module)
    with torch.no_grad():
        for key, (parameter, parts) in factors.items():
            new = parameter.detach().double()
            for part in parts:
                new = new * part.to(new.device)
            changes.set(owners[key], nn.Parameter(new.to(parameter.dtype), requires_grad=parameter.requires_grad))
    for a, b in zip(before, _results(module), strict=True):
        limit = _APART.get(a.dtype, _COARSE) * float(a.abs().max().clamp(min=1e-6)) if a.numel() else 0.0
        finite = a.isfinite() & b.isfinite()
        apart = torch.where(finite, (a - b).abs(), torch.where(a == b, 0.0, torch.inf))
        if a.numel() and not float(apart.max()) <= limit:
            return f"the results of {look.path or 'the model'} would be others"
    return None


def _results(module: nn.Module) -> list[Tensor]:
    """What a float module gives for its first call."""
    call = first_call(module)
    assert call is not None
    with torch.no_grad():
        found = module(*call[0], **call[1])
    return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]


def _renewed(old: fx.GraphModule, new: fx.GraphModule, record: Absorbed | None, why: str) -> fx.GraphModule:
    """A layer's graph with the new parameters and what its observers have seen; of a scaled input, that scaled."""
    for node in old.graph.find_nodes(op="call_module"):
        module = get_attr(old, str(node.target))
        if record is not None and isinstance(module, ChannelObserver):
            module = module.scaled(record.scale)
        new._modules[str(node.target)] = module
    for node in new.graph.nodes:
        if "smooth" in peek_meta(node):
            known = {"line": record.line.to_json()} if record is not None else {"why": why} if why else {}
            inc_meta(node)["smooth"].update(known)
    return new
