"""A model that is quantized layer by layer, exported to look at it: who could take the scales of layers in.

The whole model is exported on its first calibration call or, if that cannot be, each of its blocks. `absorb-scales`
finds who can take scales in, with what the layers' own observers have seen. The exported model is what one call has
made of it, and others may see more of it: the value of a norm that a base model ends with, say, or a branch that this
call did not take. So scales are taken in only where nothing but the block around them, or an `nn.Sequential`, can read
the value; where the call did not read some parameters of a block, nothing is scaled in that block. What calls of other
kinds make of it is tried when it is done (see `absorbing`).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from inc_graph.capture import capture
from inc_graph.channel_stats import CALLS, ChannelObserver, Recalls
from inc_graph.errors import IncError
from inc_graph.graph import get_attr, inc_meta, module_path, peek_meta
from inc_graph.passmanager import Pipeline
from inc_graph.quantization.block_inputs import block_paths
from inc_graph.quantization.kept_calls import flat_inputs
from inc_graph.quantization.kinds_of_calls import first_call, was_called
from inc_graph.quantization.leaf import Leaf
from inc_graph.recipe import Recipe, set_recipe
from inc_graph.smoothing import ABSORBED, WHY, Absorbed, FoldingError

__all__ = ["Leaves", "Look", "block_of", "looked_at", "parameter_of", "watcher"]

Leaves = dict[Leaf, list[str]]
_FOLDS = ("fold-constants", "fold-conv-bn")  # what they make is no parameter of the model
_BLOCK = re.compile(r"(.*?\.)?\d+(?=\.|$)")


def watcher(leaf: Leaf) -> ChannelObserver | None:
    """The channel observer of a layer whose input is to be smoothed."""
    found = [m for m in leaf.inner.modules() if isinstance(m, ChannelObserver)]
    return found[0] if len(found) == 1 else None


@dataclass
class Look:
    """What was found in an exported part of the model: scales that can be taken in, and for other layers why not."""

    path: str
    records: list[Absorbed]
    why: dict[str, str]

    def drop(self, group: tuple[str, ...], reason: str) -> None:
        """Do not scale these layers after all."""
        self.records = [r for r in self.records if r.together != group]
        self.why.update(dict.fromkeys(group, reason))

    def drop_all(self, records: list[Absorbed], reason: str) -> None:
        """Do not do what these say."""
        for record in list(records):
            self.drop(record.together, reason)

    def named(self, name: str) -> str:
        """The path in the model of something in the part."""
        return f"{self.path}.{name}" if self.path else name


def looked_at(model: nn.Module, ready: Leaves, recipe: Recipe) -> tuple[list[Look], str]:
    """What was found, in the whole model or in its blocks, and why there is no more."""
    if not was_called(model):
        reason = "the model itself was not called in calibration"
    else:
        found = _look(model, "", ready, recipe)
        if isinstance(found, Look):
            return [found], ""
        reason = found
    looked = []
    for path in block_paths(model, ready) or []:
        if was_called(model.get_submodule(path)):
            found = _look(model, path, ready, recipe)
            if isinstance(found, Look):
                looked.append(found)
            else:
                reason = found
    return looked, reason


def _look(model: nn.Module, path: str, ready: Leaves, recipe: Recipe) -> Look | str:
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
            read = {id(get_attr(gm, str(n.target))) for n in gm.graph.find_nodes(op="get_attr") if n.users}
            _name_in_model(gm, path)
            set_recipe(gm, replace(recipe, prepare=text))
            gm = Pipeline.parse(text).run(gm).graph
            why = _tell(gm, ready)
            gm.meta[CALLS] = Recalls([flat_inputs(gm, *call)], grams=False)
            gm = Pipeline.parse("absorb-scales").run(gm).graph
    except FoldingError:
        raise
    except IncError as e:
        return f"{path or 'the model'} cannot be exported to look at it: {e.message.splitlines()[0]}"
    look = Look(path, gm.meta[ABSORBED], {**gm.meta[WHY], **why})
    blind = {block_of(look.named(name)): name for name, p in module.named_parameters() if id(p) not in read}
    for record in look.records:
        paths = [*record.together, *record.line.takers, *(look.named(n.rpartition(".")[0]) for n in record.factors)]
        places = [block_of(p) for p in paths]
        unread = next((blind[place] for place in places if place in blind), None)
        if unread is not None:
            look.drop(record.together, f"the first call did not use {look.named(unread)}, which may read it at others")
        elif not _private(model, paths):
            look.drop(record.together, "others than its block may read the value that would be scaled")
        elif any(parameter_of(module, name) is None for name in record.factors):
            look.drop(record.together, "who could take the scale in is no parameter")
    return look


def _private(model: nn.Module, paths: list[str]) -> bool:
    """Whether nobody but one block, or the `nn.Sequential` that they are in, sees what flows between these modules."""
    block = block_of(paths[0])
    if block is not None and block not in paths and all(block_of(p) == block for p in paths):
        return True
    above = {p.rpartition(".")[0] for p in paths}
    return len(above) == 1 and type(model.get_submodule(above.pop())) is nn.Sequential


def block_of(path: str) -> str | None:
    """The outermost part of a path that ends with a number: one of a row of blocks."""
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
        observer = None if leaf is None or len(layers[leaf]) > 1 else watcher(leaf)
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


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name, None if there is none."""
    parent, _, leaf = name.rpartition(".")
    try:
        return module.get_submodule(parent)._parameters.get(leaf)
    except AttributeError:
        return None
