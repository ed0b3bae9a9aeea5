"""SmoothQuant of a model that is quantized layer by layer: norms and layers before them take the scales in.

A layer by itself knows nobody who could; the model, exported to look at it (see `looking`), shows who can. What is
found is done to the parameters of the model: the weights of norms, the rows and columns of layers; layers get their
small graphs anew, with what they have seen divided by the scale. Inputs that nobody takes the scale of are multiplied,
as they are without an export. An export shows one way through the model. So each block, and the model, is run before
and after on one calibration call of each kind, and on what one step or one sample of it would be: where its results are
not what they were, nothing is scaled after all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from inc_graph.channel_stats import ChannelObserver
from inc_graph.graph import get_attr, inc_meta, peek_meta
from inc_graph.quantization.block_inputs import block_paths
from inc_graph.quantization.finish import observers_of
from inc_graph.quantization.kinds_of_calls import forget_first_calls, keep_first_calls, was_called
from inc_graph.quantization.layers import put
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.looking import Leaves, Look, block_of, looked_at, parameter_of, watcher
from inc_graph.quantization.tried_calls import Tried
from inc_graph.recipe import Recipe
from inc_graph.smoothing import Absorbed

__all__ = ["absorbing", "forget", "watch"]


def watch(model: nn.Module, found: Leaves) -> None:
    """Let a prepared model keep what it has to be exported with, if inputs of layers are to be smoothed."""
    asking = {leaf: paths for leaf, paths in found.items() if watcher(leaf) is not None}
    if asking and not any("" in paths for paths in asking.values()):
        keep_first_calls(model, ["", *(block_paths(model, asking) or [])])


def forget(model: nn.Module) -> None:
    """Undo `watch`."""
    forget_first_calls(model)


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
        if any(watcher(leaf) is not None for leaf in found) and not any("" in paths for paths in found.values()):
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
    ready = {leaf: ps for leaf, ps in found.items() if watcher(leaf) is not None and _has_data(leaf)}
    if not ready:
        return
    with _originals(model, found):
        looked, reason = looked_at(model, ready, recipe)
        lines: dict[str, Absorbed] = {}
        why: dict[str, str] = {}
        others: list[str] = []
        for one in looked:
            whole, done = _Changes(), Tried(model.get_submodule(one.path), one.path)
            for path, records in _by_block(model, one).items():
                done.start()
                own, tried = _Changes(), Tried(model.get_submodule(path), path)
                text = _apply(model, one, records, tried if path != one.path and tried.start() else done, own)
                if text is None:
                    whole.parameters += own.parameters
                else:
                    own.undo()
                    others.append(text)
                    one.drop_all(records, text)
            text = done.differs() if whole.parameters else None
            if text is None:
                changes.parameters += whole.parameters
                lines.update({name: r for r in one.records for name in r.layers})
            else:
                whole.undo()
                others.append(text)
                one.drop_all(one.records, text)
            why.update(one.why)
    notes += [f"where others read a value inputs are multiplied: {text}" for text in dict.fromkeys(others)]
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


# -------------------------------------------------------------------------------------------------------- doing it
def _by_block(model: nn.Module, look: Look) -> dict[str, list[Absorbed]]:
    """The scales of each block that calls are known of; under the path of what was looked at those of others."""
    found: dict[str, list[Absorbed]] = {}
    for record in look.records:
        block = block_of(record.together[0])
        known = block is not None and block not in record.together and was_called(model.get_submodule(block))
        found.setdefault(block if known else look.path, []).append(record)  # type: ignore[arg-type]
    return found


def _apply(model: nn.Module, look: Look, records: list[Absorbed], tried: Tried, changes: _Changes) -> str | None:
    """Scale parameters of a part of the model; why it must not be, if its results are others then."""
    module = model.get_submodule(look.path)
    within = {id(m) for m in module.modules()}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((owner, name))
    for record in list(records):
        tensors = [parameter_of(module, name) for name in record.factors]
        if any(id(owner) not in within for p in tensors for owner, _ in owners[id(p)]):
            look.drop(record.together, "who could take the scale in has a parameter of another part of the model")
    factors: dict[int, tuple[nn.Parameter, list[Tensor]]] = {}
    for record in (r for r in records if r in look.records):
        for name, factor in record.factors.items():
            taker: Any = parameter_of(module, name)
            factors.setdefault(id(taker), (taker, []))[1].append(factor)
    if not factors:
        return None
    tried.start()
    with torch.no_grad():
        for key, (parameter, parts) in factors.items():
            new = parameter.detach().double()
            for part in parts:
                new = new * part.to(new.device)
            changes.set(owners[key], nn.Parameter(new.to(parameter.dtype), requires_grad=parameter.requires_grad))
    return tried.differs()


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
