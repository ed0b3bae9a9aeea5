"""Writing out autocast and grad-mode regions of an exported program.

The exporter wraps such a region in a higher-order call whose body a walk over the graph does not see. Left to
`run_decompositions`, the body is inlined but every operator in it loses its module path. Here the bodies are copied
into the graph with their metadata. A grad-mode region then needs nothing more, if no gradient is wanted; else what is
computed where gradients are off is detached where it leaves, for the outside or for a region where they are on, and
where it is written to something from outside. In an autocast region the casts happen inside the dispatcher and are not
in the body, so they are written out: each operator is run on fake tensors under the region's autocast, and the casts
the dispatcher made to its inputs become nodes.

A call for which that is not all autocast does is put into a region of its own instead: `run_decompositions` inlines
that one correctly, and with the path. (Regions in regions it would get wrong.)
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from inc_graph.errors import CaptureError

aten = torch.ops.aten

_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_COPIED = ("nn_module_stack", "stack_trace", "custom")


Env = dict[fx.Node, Any]
Autocast = tuple[str, torch.dtype | None, bool]  # device, dtype, enabled


class _CannotInline(Exception):
    pass


@dataclass
class _Emit:
    """Where the bodies go."""

    root: fx.GraphModule
    training: bool  # grad modes have a meaning
    made: set[str] = field(default_factory=set)  # bodies that were put around single calls
    gradless: set[fx.Node] = field(default_factory=set)  # computed where gradients are off


def inline_regions(program: Any, training: bool = False) -> None:
    """Write out the autocast and grad-mode regions of an ExportedProgram, in place; control-flow bodies as well.

    `training`: with the gradients that they have.
    """
    gm = program.graph_module
    renamed = _inline_in(gm, training)
    for old, new in renamed.items():
        program.graph_signature.replace_all_uses(old, new)


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _REGIONS


def _inline_in(gm: fx.GraphModule, training: bool) -> dict[str, str]:
    """Returns {old: new} for output names that changed."""
    renamed: dict[str, str] = {}
    emit = _Emit(gm, training)
    outputs = {n.name for node in gm.graph.find_nodes(op="output") for n in node.all_input_nodes}
    changed = False
    for node in list(gm.graph.nodes):
        if not _is_region(node):
            continue
        changed = True
        with gm.graph.inserting_before(node):
            values = _emit_region(emit, gm, node, {}, [], True)
        for user in list(node.users):
            value = values[user.args[1]]
            user.replace_all_uses_with(value)
            if user.name in outputs:
                renamed[user.name] = value.name
            gm.graph.erase_node(user)
        for source in node.all_input_nodes:
            source.users.setdefault(node)  # torch forgets to note a region that gives nothing
        gm.graph.erase_node(node)
    used = set()
    for node in list(gm.graph.find_nodes(op="get_attr")):
        child = getattr(gm, str(node.target), None) if "." not in str(node.target) else None
        if isinstance(child, fx.GraphModule):
            if not node.users:
                gm.graph.erase_node(node)
                continue
            used.add(node.target)
            if node.target not in emit.made:
                _inline_in(child, training)
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule) and name not in used:
            delattr(gm, name)
    if changed:
        gm.recompile()
    return renamed


def _emit_region(
    emit: _Emit, owner: fx.GraphModule, node: fx.Node, env: Env, casts: list[Autocast], around: bool
) -> list[Any]:
    """Copy the body of region `node` (a node of `owner`) to the insertion point of `root`; returns its outputs.

    `around`: whether gradients are on around it.
    """
    root, grad = emit.root, around
    args: list[Any] = list(node.args)
    if getattr(node.target, "__name__", "") == "wrap_with_autocast":
        device, dtype, enabled, _cache, body_node, *inputs = args
        casts = [*casts, (device, dtype, enabled)]
    else:
        grad, body_node, *inputs = args
    body = getattr(owner, body_node.target)
    inputs = [env.get(a, a) if isinstance(a, fx.Node) else a for a in inputs]
    if grad and not around:
        inputs = [_without_gradient(emit, a) for a in inputs]
    inner: Env = {}
    for child in body.graph.nodes:
        if child.op == "placeholder":
            inner[child] = inputs.pop(0)
        elif child.op == "output":
            result = fx.map_arg(child.args[0], inner.__getitem__)
            results = list(result) if isinstance(result, list | tuple) else [result]
            return [_without_gradient(emit, r) for r in results] if around and not grad else results
        elif _is_region(child):
            inner[child] = _emit_region(emit, body, child, inner, casts, grad)
        elif child.op == "get_attr":
            value = getattr(body, child.target) if "." not in child.target else body.get_submodule(child.target)
            if isinstance(value, fx.GraphModule) and all(_is_region(u) for u in child.users):
                continue  # the body of an inner region
            inner[child] = root.graph.get_attr(_adopt_attr(root, value))
            inner[child].meta = dict(child.meta)
        elif child.target is operator.getitem and isinstance(inner.get(child.args[0]), list):
            inner[child] = inner[child.args[0]][child.args[1]]
        else:
            inner[child] = _emit_call(emit, child, inner, casts, grad)
    return []


def _without_gradient(emit: _Emit, value: Any) -> Any:
    """`value`, detached if it was computed where gradients are off; some are lists."""
    if isinstance(value, list | tuple):
        return [_without_gradient(emit, v) for v in value]
    return _detached(emit, value) if emit.training and value in emit.gradless else value


def _detached(emit: _Emit, node: fx.Node) -> fx.Node:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return node
    new = emit.root.graph.call_function(aten.detach.default, (node,))
    new.meta = {k: node.meta[k] for k in (*_COPIED, "val") if k in node.meta}
    return new


def _detach_written(emit: _Emit, call: fx.Node) -> None:
    """What a call where gradients are off writes into a value, perhaps one from outside, has no gradient."""
    schema = getattr(call.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    written = [
        (i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    targets = {call.args[i] if i < len(call.args) else call.kwargs.get(name) for i, name in written}
    with emit.root.graph.inserting_before(call):
        for source in call.all_input_nodes:
            if source not in targets:
                call.replace_input_with(source, _detached(emit, source))


def _adopt_attr(root: fx.GraphModule, value: Any) -> str:
    number = 0
    while hasattr(root, name := f"_region_attr_{number}"):
        number += 1
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)
    return name


def _emit_call(emit: _Emit, node: fx.Node, env: Env, casts: list[Autocast], grad: bool) -> Any:
    """Copy one call with what autocast does to it; a list if it stays in a region and has several outputs."""
    root = emit.root
    args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
    if any(enabled for _, _, enabled in casts) and isinstance(node.target, torch._ops.OpOverload):
        try:
            wanted, extra = _autocast_call(node, args, kwargs, casts)
        except _CannotInline:
            kept = _keep_in_region(root, node, args, kwargs, casts, emit.made)
            if not grad:
                emit.gradless.update(kept if isinstance(kept, list) else [kept])
            return kept
        copies: dict[fx.Node, fx.Node] = {}
        for source, value in wanted.items():
            copies[source] = root.graph.call_function(aten._to_copy.default, (source,), {"dtype": value.dtype})
            copies[source].meta = {k: node.meta[k] for k in _COPIED if k in node.meta} | {"val": value}
        args, kwargs = fx.map_arg((args, {**kwargs, **extra}), lambda n: copies.get(n, n))
    new = root.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
    new.meta = dict(node.meta)
    if not grad:
        emit.gradless.add(new)
        if emit.training:
            _detach_written(emit, new)
    return new


def _keep_in_region(
    root: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any, casts: list[Autocast], made: set[str]
) -> Any:
    """Put one call into an autocast region of its own, which has the call's module path and so passes it on."""
    devices = {device: (device, dtype, enabled) for device, dtype, enabled in casts}
    if len(devices) > 1:
        raise CaptureError(f"{node.target} under autocast for several devices cannot be captured", node=node)
    inputs: dict[fx.Node, None] = {}
    fx.map_arg((args, kwargs), lambda n: inputs.setdefault(n))
    graph = fx.Graph()
    stand_in: dict[fx.Node, fx.Node] = {}
    for number, source in enumerate(inputs):
        stand_in[source] = graph.placeholder(f"arg{number}")
        stand_in[source].meta["val"] = source.meta.get("val")
    call = graph.create_node("call_function", node.target, *fx.map_arg((args, kwargs), stand_in.__getitem__))
    call.meta = dict(node.meta)
    value = node.meta.get("val")
    several = isinstance(value, list | tuple)
    graph.output(tuple(_outputs(graph, call, value)) if several else (call,))
    name = _adopt_attr(root, fx.GraphModule(nn.Module(), graph))
    made.add(name)
    region: Any = torch.ops.higher_order.wrap_with_autocast
    (setting,) = devices.values()
    kept = root.graph.call_function(region, (*setting, False, root.graph.get_attr(name), *inputs))
    kept.meta = {k: node.meta[k] for k in _COPIED if k in node.meta}
    results = _outputs(root.graph, kept, value if several else (value,))
    return results if several else results[0]


def _outputs(graph: fx.Graph, call: fx.Node, values: Any) -> list[fx.Node]:
    nodes = [graph.call_function(operator.getitem, (call, i)) for i in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta = {k: call.meta[k] for k in _COPIED if k in call.meta} | {"val": value}
    return nodes


class _Record(TorchDispatchMode):
    """Notes the casts made to given tensors before anything else is called."""

    def __init__(self, watched: dict[int, fx.Node]) -> None:
        super().__init__()
        self.watched, self.leading = watched, True
        self.casts: Env = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        node = self.watched.get(id(args[0])) if args else None
        if self.leading and func is aten._to_copy.default and node is not None:
            self.casts[node] = out
        elif func.namespace != "prim":  # prim::device: autocast looks at its arguments
            self.leading = False
        return out


def _run(node: fx.Node, args: Any, kwargs: Any, casts: list[Autocast], cast: Env) -> tuple[Any, Env]:
    """Run the call on fake values under autocast; returns its value and the casts {input: fake value} it made."""
    watched: dict[int, fx.Node] = {}
    modes: list[Any] = []

    def value_of(n: fx.Node) -> Any:
        value = cast.get(n, n.meta.get("val"))
        if isinstance(value, FakeTensor):
            watched[id(value)] = n
            modes.append(value.fake_mode)
        return value

    args, kwargs = fx.map_arg((args, kwargs), value_of)
    call: Any = node.target
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device, dtype, enabled in casts:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        if modes:
            stack.enter_context(modes[0])
        record = stack.enter_context(_Record(watched))
        try:
            return call(*args, **kwargs), record.casts
        except Exception as e:
            raise _CannotInline(str(e)) from e


def _autocast_call(node: fx.Node, args: Any, kwargs: Any, casts: list[Autocast]) -> tuple[Env, dict[str, Any]]:
    """What autocast does to this call: ({input: fake value after the cast}, further keyword arguments).

    _CannotInline if that is not all it does, told by the dtypes of the result.
    """
    off = [(device, dtype, False) for device, dtype, _ in casts]
    wanted_value, wanted = _run(node, args, kwargs, casts, {})
    try:
        plain_value, own = _run(node, args, kwargs, off, {})
    except _CannotInline:  # without the casts, an operator may refuse inputs of mixed dtypes
        plain_value, own = None, {}
    wanted = {n: value for n, value in wanted.items() if n not in own}  # `own` are casts of the operator itself
    if not wanted and plain_value is not None and _dtypes(plain_value) == _dtypes(wanted_value):
        return {}, {}
    options: list[dict[str, Any]] = [{}]
    if any(a.name == "dtype" for a in node.target._schema.arguments) and len(_dtypes(wanted_value)) == 1:  # type: ignore[union-attr]
        options.append({"dtype": _dtypes(wanted_value)[0]})  # softmax and the like: autocast chooses their dtype
    for extra in options:
        with contextlib.suppress(_CannotInline):
            value, _ = _run(node, args, {**kwargs, **extra}, off, wanted)
            if _dtypes(value) == _dtypes(wanted_value):
                return wanted, extra
    raise _CannotInline(f"autocast changes more than the inputs of {node.target}")


def _dtypes(value: Any) -> list[torch.dtype]:
    return [v.dtype for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]
