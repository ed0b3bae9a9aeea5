"""A Q-DQ graph as JSON and back: nodes, arguments, fake values, module paths and annotations.

Nothing in a file is taken for code. FX writes Python from a graph, so every name that would stand in it is checked to
be one; operators are looked up among those that torch has, functions in a short list.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from inc_graph.errors import IncError, SavedModelError
from inc_graph.graph import get_attr, peek_meta, set_level, val
from inc_graph.inputs import watch_inputs
from inc_graph.saving.meta import check_meta, finite, infinite
from inc_graph.saving.operators import check_arguments, name_of_call, read_call
from inc_graph.saving.tensors import TensorReader, TensorWriter
from inc_graph.saving.trees import read_tree, write_tree
from inc_graph.saving.values import decode, dtype_of, encode
from inc_graph.verify import verify

__all__ = ["read_graph", "write_graph"]

_DEEPEST = 16  # graphs in graphs
_TAKEN = ("self", "torch", "pytree", "fx_pytree", "device", "inf", "nan", "NoneType")  # what FX's code needs


# -------------------------------------------------------------------------------------------------------------- write
def _symbols() -> Any:
    """The module that knows sizes of run time. It loads sympy, which takes longer than all the rest."""
    from inc_graph.saving import symbols

    return symbols


def write_graph(
    gm: fx.GraphModule, tensors: TensorWriter, packed: dict[str, Callable[[], torch.Tensor]] | None = None
) -> dict[str, Any]:
    """JSON-able form of a graph; its tensors go to `tensors`.

    Args:
        gm: At level "qdq", or the body of a branch.
        tensors: Collects them.
        packed: Attribute -> function that gives its values, for what the module holds a placeholder of.

    Raises:
        SavedModelError: something in the graph has no such form; names the node.
    """
    stacks: dict[str, int] = {}
    nodes = []
    for node in gm.graph.nodes:
        try:
            nodes.append(_node(node, stacks))
        except SavedModelError as e:
            raise SavedModelError(e.message, node=node, hint=e.hint) from e
    data: dict[str, Any] = {
        "nodes": nodes,
        "stacks": [json.loads(s) for s in stacks],
        "symbols": _symbols().write_symbols(val(n) for n in gm.graph.nodes),
        "attributes": _attributes(gm, tensors, packed or {}),
        "meta": finite(json.loads(json.dumps(gm.meta.get("inc", {})))),
    }
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is not None:
        data["call"] = {"names": list(info.orig_args), "in": write_tree(info.in_spec), "out": write_tree(info.out_spec)}
    return data


def _node(node: fx.Node, stacks: dict[str, int]) -> dict[str, Any]:
    target = name_of_call(node) if node.op == "call_function" else str(node.target)
    data: dict[str, Any] = {"name": node.name, "op": node.op, "target": target, "args": encode(list(node.args))}
    if node.kwargs:
        data["kwargs"] = encode(dict(node.kwargs))["dict"]
    if node.op != "output":
        data["value"] = _value(val(node))
    if stack := [[str(f[0]), _class_name(f[1])] for f in (node.meta.get("nn_module_stack") or {}).values()]:
        data["stack"] = stacks.setdefault(json.dumps(stack), len(stacks))
    if notes := peek_meta(node):
        data["notes"] = json.loads(json.dumps(notes))
    return data


def _class_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            raise SavedModelError(
                f"it has {str(value.layout).removeprefix('torch.')} values: only dense ones are saved"
            )
        sizes, strides = [[d if isinstance(d, int) else _text(d) for d in x] for x in (value.shape, value.stride())]
        kind = str(value.dtype).removeprefix("torch.")
        return {"dtype": kind, "shape": sizes, "stride": strides, "device": str(value.device)}
    for kind, plain in (("int", torch.SymInt), ("float", torch.SymFloat), ("bool", torch.SymBool)):
        if isinstance(value, plain):
            return {"kind": kind, "expression": _text(value)}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_value(v) for v in value]}
    return {"constant": encode(value)}


def _text(value: Any) -> str:
    return str(value.node.expr)


def _attributes(gm: fx.GraphModule, tensors: TensorWriter, packed: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reads = gm.graph.find_nodes(op="get_attr")
    tensors.expect(v for n in reads if isinstance(v := get_attr(gm, str(n.target)), torch.Tensor))
    for node in reads:
        path = str(node.target)
        if path in found:
            continue
        value = get_attr(gm, path)
        if not _is_path(path):
            hint = "name it with letters, digits, '_', '-', ' ', ':', '@', '+' and '/'"
            raise SavedModelError(f"attribute {path!r} has a name that cannot be saved", node=node, hint=hint)
        if isinstance(value, fx.GraphModule):
            found[path] = {"graph": write_graph(value, tensors)}
        elif isinstance(value, torch.Tensor):
            record = tensors.add(path, value, node, lazy=packed.get(path))
            owner, _, leaf = path.rpartition(".")
            kept = leaf not in gm.get_submodule(owner)._non_persistent_buffers_set
            found[path] = {**record, "parameter": isinstance(value, nn.Parameter), "persistent": kept}
        else:
            raise SavedModelError(f"attribute {path} is {type(value).__name__}, not a tensor", node=node)
    return found


# --------------------------------------------------------------------------------------------------------------- read
def read_graph(data: Any, tensors: TensorReader, device: torch.device | None = None) -> fx.GraphModule:
    """The graph module of what `write_graph` gave, verified.

    Args:
        data: From JSON.
        tensors: Where its tensors are.
        device: For all tensors, and for what the graph creates; None for the one it was saved on.

    Raises:
        SavedModelError: it is no such form, or what it says does not agree; names the node.
    """
    try:
        gm = _read(data, tensors, device)
        gm.recompile()
        watch_inputs(gm)
        gm._register_deepcopy_hook(watch_inputs)
        verify(gm)
    except SavedModelError:
        raise
    except IncError as e:
        raise SavedModelError(f"the graph is not valid: {e.message}", node=e.node, module=e.module) from e
    except Exception as e:  # whatever the libraries say of arguments that make no sense
        raise SavedModelError(f"the graph cannot be read: {type(e).__name__}: {str(e)[:200]}") from e
    return gm


class _Reader:
    def __init__(self, data: Any, device: torch.device | None, outer: _Reader | None) -> None:
        self.device = device
        self.symbols: Any = outer.symbols if outer else _symbols().Symbols({})
        self.symbols.add(_field(data, "symbols", dict))
        fake = outer.mode if outer else FakeTensorMode(shape_env=self.symbols.env, allow_non_fake_inputs=True)
        self.mode: FakeTensorMode = fake
        self.stacks = [_stack(s) for s in _field(data, "stacks", list)]
        self.nodes: dict[str, fx.Node] = {}

    def node(self, name: str) -> fx.Node:
        if name not in self.nodes:
            raise SavedModelError(f"it reads {name[:60]!r}, which is not before it")
        return self.nodes[name]

    def value(self, data: Any) -> Any:
        if isinstance(data, dict) and set(data) == {"dtype", "shape", "stride", "device"}:
            sizes = [self.symbols.integer(d) for d in _field(data, "shape", list)]
            strides = [self.symbols.integer(d) for d in _field(data, "stride", list)]
            place = self.device or torch.device(str(data["device"]))
            with self.mode:
                return torch.empty_strided(sizes, strides, dtype=dtype_of(data["dtype"]), device=place)
        if isinstance(data, dict) and set(data) == {"kind", "expression"}:
            return self.symbols.number(data["kind"], data["expression"])
        if isinstance(data, dict) and len(data) == 1:
            ((kind, inner),) = data.items()
            if kind in ("list", "tuple") and isinstance(inner, list):
                parts = [self.value(v) for v in inner]
                return parts if kind == "list" else tuple(parts)
            if kind == "constant":
                return decode(inner, device=self.device)
        raise SavedModelError("its value cannot be read")


def _field(data: Any, name: str, kind: type) -> Any:
    if not isinstance(data, dict) or not isinstance(data.get(name), kind):
        raise SavedModelError(f"field {name!r} of the graph is missing or not a {kind.__name__}")
    return data[name]


def _stack(data: Any) -> dict[str, tuple[str, str]]:
    if not isinstance(data, list) or not all(
        isinstance(f, list) and len(f) == 2 and all(isinstance(x, str) for x in f) for f in data
    ):
        raise SavedModelError("field 'stacks' of the graph cannot be read")
    return {f"{path}#{i}": (path, kind) for i, (path, kind) in enumerate(data)}


def _read(
    data: Any, tensors: TensorReader, device: torch.device | None, outer: _Reader | None = None, depth: int = 0
) -> fx.GraphModule:
    if depth > _DEEPEST:
        raise SavedModelError(f"more than {_DEEPEST} graphs are in one another")
    reader = _Reader(data, device, outer)
    root = nn.Module()
    attributes = _field(data, "attributes", dict)
    for path, record in attributes.items():
        _attach(root, path, record, tensors, reader, depth)
    graph = fx.Graph()
    for number, node in enumerate(_field(data, "nodes", list)):
        try:
            _read_node(graph, node, reader)
        except SavedModelError as e:
            name = node.get("name") if isinstance(node, dict) else None
            raise SavedModelError(e.message, node=str(name or f"number {number}")[:60], hint=e.hint) from e
    if not graph.nodes or next(iter(reversed(graph.nodes))).op != "output":
        raise SavedModelError("the graph does not end with its output")
    _check_attributes(graph, root, attributes)
    if "call" in data:
        _read_call(graph, data["call"])
    gm = fx.GraphModule(root, graph)
    buffers = dict(gm.named_buffers(remove_duplicate=False))
    for path, record in attributes.items():  # this it does not take over from the root
        if record.get("persistent") is False and path in buffers:
            owner, _, leaf = path.rpartition(".")
            gm.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
    meta = infinite(_field(data, "meta", dict))
    if meta:
        check_meta(meta, graph)
        gm.meta["inc"] = meta
        set_level(gm, meta.get("level", "qdq"))
    gm.eval()
    return gm


def _is_path(path: str) -> bool:
    """Whether FX can write code that reads this attribute: it puts each part between quotes."""
    return all(re.fullmatch(r"[\w\- :@+/]+", part) for part in path.split("."))


def _attach(root: nn.Module, path: str, record: Any, tensors: TensorReader, reader: _Reader, depth: int) -> None:
    if not _is_path(path):
        raise SavedModelError(f"not the name of an attribute: {path[:60]!r}")
    prefix, _, leaf = path.rpartition(".")
    owner = root
    for part in prefix.split(".") if prefix else ():
        if part not in owner._modules:
            if hasattr(owner, part):
                raise SavedModelError(f"not the name of an attribute: {path[:60]!r}")
            owner._modules[part] = nn.Module()
        owner = owner._modules[part]  # type: ignore[assignment]
    if hasattr(owner, leaf):
        raise SavedModelError(f"not the name of an attribute: {path[:60]!r}")
    if isinstance(record, dict) and set(record) == {"graph"}:
        body = _read(record["graph"], tensors, reader.device, reader, depth + 1)
        body.recompile()
        owner._modules[leaf] = body
        return
    tensor = tensors.get(path, record)
    if isinstance(record, dict) and record.get("parameter"):
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner.register_buffer(leaf, tensor)


def _read_node(graph: fx.Graph, data: Any, reader: _Reader) -> None:
    known = {"name", "op", "target", "args", "kwargs", "value", "stack", "notes"}
    if not isinstance(data, dict) or not set(data) <= known:
        raise SavedModelError("it has fields that are not known")
    name, op, target = (data.get(k) for k in ("name", "op", "target"))
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name in reader.nodes:
        raise SavedModelError("its name cannot be one")
    if not isinstance(target, str):
        raise SavedModelError("field 'target' is no text")
    call: Any = target
    if op == "call_function":
        call = read_call(target)
    elif op == "placeholder":
        if not _is_input(target):
            raise SavedModelError("field 'target' is not the name of an input")
    elif op not in ("get_attr", "output"):
        raise SavedModelError(f"field 'op' is {op!r}"[:80])
    args = decode({"tuple": data.get("args", [])}, reader.node, reader.device)
    check_arguments(call, args)
    kwargs = decode({"dict": data.get("kwargs", [])}, reader.node, reader.device)
    if not all(isinstance(k, str) and k.isidentifier() for k in kwargs):
        raise SavedModelError("field 'kwargs' has a name that cannot be one")
    node = graph.create_node(op, call, args, kwargs, name)
    if node.name != name:
        raise SavedModelError(f"its name cannot be {name!r}")
    if op != "output":
        node.meta["val"] = reader.value(data.get("value"))
        reader.nodes[name] = node
    if "stack" in data:
        number = data["stack"]
        if not isinstance(number, int) or not 0 <= number < len(reader.stacks):
            raise SavedModelError("field 'stack' is not the number of one")
        node.meta["nn_module_stack"] = reader.stacks[number]
    if "notes" in data:
        if not isinstance(data["notes"], dict):
            raise SavedModelError("field 'notes' is not a table")
        node.meta["custom"] = {"inc": data["notes"]}


def _check_attributes(graph: fx.Graph, root: nn.Module, attributes: dict[str, Any]) -> None:
    """What the graph reads is there, and of the shape and dtype that the graph was made for."""
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in attributes:
            raise SavedModelError(f"it reads attribute {node.target!r}, which is not saved"[:120], node=node)
        value, want = get_attr(root, str(node.target)), val(node)
        if isinstance(value, fx.GraphModule) and want is None:
            continue
        if not isinstance(want, FakeTensor) or not isinstance(value, torch.Tensor):
            raise SavedModelError("its value is not that of its attribute", node=node)
        if (tuple(value.shape), value.dtype) != (tuple(want.shape), want.dtype):
            what = f"attribute {node.target} is {value.dtype} {list(value.shape)}"
            raise SavedModelError(f"{what}, the graph reads {want.dtype} {list(want.shape)}", node=node)


def _is_input(name: Any) -> bool:
    good = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
    return good and name not in _TAKEN


def _read_call(graph: fx.Graph, data: Any) -> None:
    """How the graph is called: the names of its arguments and the nesting of inputs and outputs."""
    names = _field(data, "names", list)
    if not all(_is_input(n) for n in names) or len(set(names)) != len(names):
        raise SavedModelError("field 'names' of the graph has one that cannot be one")
    inputs, output = read_tree(data.get("in")), read_tree(data.get("out"))
    call = pytree.tree_unflatten([None] * inputs.num_leaves, inputs)
    if not (isinstance(call, tuple) and len(call) == 2 and isinstance(call[0], tuple) and isinstance(call[1], dict)):
        raise SavedModelError("the structure of the inputs is not that of a call")
    count = sum(n.op == "placeholder" for n in graph.nodes)
    if inputs.num_leaves != count or len(names) != len(call[0]) + len(call[1]):
        raise SavedModelError("the structure of the inputs does not agree with the graph")
    results: Any = next(iter(reversed(graph.nodes))).args[0]
    if not isinstance(results, list | tuple) or len(results) != output.num_leaves:
        raise SavedModelError("the structure of the outputs does not agree with the graph")
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(names), inputs, output)))
