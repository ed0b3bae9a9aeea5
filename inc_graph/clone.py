"""Copies of graph modules that share every tensor.

A pass that must not touch its input works on `clone(gm)`; `adopt(dst, src)` then gives the result back under the
reference the caller holds.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from inc_graph.collector import collector_paused


def _copy_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy_json(v) for k, v in value.items()}
    return [_copy_json(v) for v in value] if isinstance(value, list) else value


def _copy_module(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """A module with its own attribute dictionaries and the same tensors."""
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, fx.GraphModule):
        return _clone(module, memo)
    new = memo[id(module)] = module.__class__.__new__(module.__class__)
    new.__dict__.update(module.__dict__)
    _copy_tables(module, new, memo)
    return new


def _copy_tables(src: nn.Module, dst: nn.Module, memo: dict[int, nn.Module]) -> None:
    for key, value in src.__dict__.items():
        if key == "_modules":
            dst.__dict__[key] = {k: None if m is None else _copy_module(m, memo) for k, m in value.items()}
        elif key in ("_parameters", "_buffers", "_non_persistent_buffers_set") or "_hooks" in key:
            dst.__dict__[key] = copy.copy(value)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy without recursion; node metadata is copied one level deep, annotations all the way, `val` is shared."""
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    table: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = table[node] = new.node_copy(node, table.__getitem__)
        if "custom" in copied.meta:
            custom = copied.meta["custom"] = dict(copied.meta["custom"] or {})
            if "inc" in custom:
                custom["inc"] = _copy_json(custom["inc"])
    new._codegen = copy.copy(graph._codegen)  # the pytree calling convention
    return new


def _clone(gm: fx.GraphModule, memo: dict[int, nn.Module]) -> fx.GraphModule:
    new = memo[id(gm)] = _empty(gm.__class__.__name__)
    _copy_tables(gm, new, memo)
    new.__dict__.update({k: v for k, v in gm.__dict__.items() if k not in new.__dict__})
    new.training = gm.training
    new.meta = {k: _copy_json(v) if k == "inc" else copy.copy(v) for k, v in gm.meta.items()}
    _share_code(gm, new, copy_graph(gm.graph))
    return new


def _empty(name: str) -> fx.GraphModule:
    """A graph module without a graph: that generates no code, which takes longer than all else here."""
    new = fx.GraphModule.__new__(fx.GraphModule)
    nn.Module.__init__(new)
    type(new).__name__ = name
    hooks: dict[str, list[Any]] = {
        f"_{kind}_hooks": [] for kind in ("replace", "create_node", "erase_node", "deepcopy")
    }
    new.__dict__.update(hooks, _tracer_cls=None, _tracer_extras={}, shape_env=None)
    return new


_CODE = ("_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec")  # what `recompile` sets


def _share_code(gm: fx.GraphModule, new: fx.GraphModule, graph: fx.Graph) -> None:
    """Give a copy its graph, and the function that was generated from the original's: generating it again is slow."""
    if type(gm).recompile is not fx.GraphModule.recompile or "_code" not in gm.__dict__:
        new.graph = graph
        return
    new._graph = graph
    graph.owning_module = new
    new.__dict__.update({k: gm.__dict__[k] for k in _CODE if k in gm.__dict__})
    type(new).forward = type(gm).forward


@collector_paused()
def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module that can be edited freely: own graph, annotations and attribute tables, but the same tensors.

    It runs what the original runs: an original that was edited and not recompiled has to be, and so has its copy.
    No weight is copied. Submodules (observers) are copied the same way: their own tables, the same tensors.
    """
    return _clone(gm, {})


def adopt(dst: fx.GraphModule, src: fx.GraphModule) -> fx.GraphModule:
    """Make `dst` become `src` in place (the caller's reference stays valid). `src` must not be used afterwards."""
    if dst is src:
        return dst
    keep = {k: v for k, v in dst.__dict__.items() if k in ("_tracer_cls", "_tracer_extras")}
    dst.__dict__.clear()
    dst.__dict__.update(src.__dict__)
    dst.__dict__.update(keep)
    _share_code(src, dst, src.graph)
    return dst
