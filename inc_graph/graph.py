"""Reading and editing FX graphs.

Every edit goes through this file, so that three things hold after each of them: the new node has a fake value
(`meta["val"]`), it knows where it came from (`nn_module_stack`, `stack_trace`, `custom.inc.provenance`), and the edit
cost does not depend on the size of the graph. None of these functions recompiles, lints or removes dead code, except
`erase_dead`, which a pass calls once, at its end.

Annotations live in `node.meta["custom"]["inc"]` (JSON-able: the only private metadata that survives re-export and
saving); facts about the whole graph live in `gm.meta["inc"]`.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from inc_graph.clone import adopt, clone, copy_graph
from inc_graph.collector import collector_paused
from inc_graph.errors import IncError

__all__ = [
    "LEVELS", "Fuel", "adopt", "clone", "code_later", "copy_graph", "current_fuel", "current_pass", "dtype",
    "editing", "erase_dead", "fake_call", "get_attr", "get_level", "get_tensor", "inc_meta", "insert_call",
    "insert_get_attr", "insert_module", "is_contiguous", "is_float", "module_path", "module_type", "mutated_attrs",
    "peek_meta", "replace_uses", "set_level", "set_module", "set_tensor", "shape", "storage_key", "take_fuel",
    "unique_name", "users_of", "val", "view_key", "written_args",
]  # fmt: skip

LEVELS = ("float", "annotated", "observed", "trainable", "qdq", "lowered")


# ---------------------------------------------------------------------------------------------- the edit context
@dataclass
class Fuel:
    """A budget of rewrites. `left` counts down; at 0 every further rewrite is refused."""

    left: int

    def take(self) -> bool:
        if self.left <= 0:
            return False
        self.left -= 1
        return True


_PASS: contextvars.ContextVar[str | None] = contextvars.ContextVar("inc_pass", default=None)
_FUEL: contextvars.ContextVar[Fuel | None] = contextvars.ContextVar("inc_fuel", default=None)
_CODE_LATER: contextvars.ContextVar[bool] = contextvars.ContextVar("inc_code_later", default=False)


@contextlib.contextmanager
def editing(pass_name: str | None = None, fuel: Fuel | None = None) -> Iterator[None]:
    """Within the block, new nodes are stamped with `pass_name` and `take_fuel` draws on `fuel`."""
    tokens = (_PASS.set(pass_name), _FUEL.set(fuel))
    try:
        yield
    finally:
        _PASS.reset(tokens[0])
        _FUEL.reset(tokens[1])


@contextlib.contextmanager
def code_later() -> Iterator[None]:
    """Within the block `erase_dead` generates no code: whoever opened it recompiles once, after the last edit."""
    token = _CODE_LATER.set(True)
    try:
        yield
    finally:
        _CODE_LATER.reset(token)


def current_fuel() -> Fuel | None:
    """The fuel in force, None for no limit."""
    return _FUEL.get()


def current_pass() -> str | None:
    """Name of the pass (and rule) that edits now, None outside of one."""
    return _PASS.get()


def take_fuel() -> bool:
    """Ask to do one optional rewrite. False once the fuel is spent (`INC_FUEL`); without a limit, always True."""
    fuel = _FUEL.get()
    return fuel is None or fuel.take()


# ------------------------------------------------------------------------------------------------------ metadata
def get_level(gm: fx.GraphModule) -> str:
    """The level of the graph, one of `LEVELS`; a graph that was never stamped is "float"."""
    return gm.meta.get("inc", {}).get("level", "float")


def set_level(gm: fx.GraphModule, level: str) -> None:
    """Stamp the level. IncError on a name not in `LEVELS`."""
    if level not in LEVELS:
        raise IncError(f"unknown level {level!r}", hint=f"levels are {', '.join(LEVELS)}")
    gm.meta.setdefault("inc", {})["level"] = level


def inc_meta(node: fx.Node) -> dict[str, Any]:
    """The node's annotation dictionary (JSON-able); created empty on first use."""
    return node.meta.setdefault("custom", {}).setdefault("inc", {})


def peek_meta(node: fx.Node) -> dict[str, Any]:
    """Like `inc_meta`, but never writes: a node without annotations gives a fresh empty dictionary."""
    return (node.meta.get("custom") or {}).get("inc") or {}


_STACK_NOISE = re.compile(r"^L(\['self'\]|__self__)")
_STACK_INDEX = re.compile(r"(?:\._modules)?\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")


def _frames(node: fx.Node) -> list[tuple[str, Any]]:
    stack = node.meta.get("nn_module_stack") or {}
    return [f for f in stack.values() if isinstance(f, tuple) and not str(f[0]).startswith("_empty_nn_module_stack")]


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that made this node, '' for the root or where it is not known."""
    frames = _frames(node)
    if not frames:
        return ""
    path = _STACK_NOISE.sub("", str(frames[-1][0]))
    path = _STACK_INDEX.sub(lambda m: "." + next(g for g in m.groups() if g is not None), path)
    return re.sub(r"@\d+", "", path).lstrip(".")  # "@1" marks the second call of one module


def module_type(node: fx.Node) -> str | None:
    """Qualified class name of the innermost module, such as "torch.nn.modules.linear.Linear"; None if not known."""
    frames = _frames(node)
    if not frames or len(frames[-1]) < 2:
        return None
    cls = frames[-1][1]
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def val(node: fx.Node) -> Any:
    """The fake value: FakeTensor, SymInt, a tuple of them, or None."""
    return node.meta.get("val")


def shape(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape (ints or SymInts) of a node that holds one tensor, else None."""
    value = val(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def dtype(node: fx.Node) -> torch.dtype | None:
    """dtype of a node that holds one tensor, else None."""
    value = val(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_float(node: fx.Node) -> bool:
    """True for one floating-point tensor: the only thing that may be quantized."""
    kind = dtype(node)
    return kind is not None and kind.is_floating_point


def users_of(node: fx.Node) -> list[fx.Node]:
    """Users as a list that stays valid while they are edited."""
    return list(node.users)


# --------------------------------------------------------------------------------------------------------- tensors
def _owner(gm: nn.Module, path: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = path.rpartition(".")
    return (gm.get_submodule(prefix) if prefix else gm), leaf


def get_attr(gm: nn.Module, path: str) -> Any:
    """The attribute at a dotted path. IncError if there is none."""
    try:
        owner, leaf = _owner(gm, path)
        return getattr(owner, leaf)
    except AttributeError as e:
        raise IncError(f"the graph module has no attribute {path!r}") from e


def get_tensor(gm: fx.GraphModule, node: fx.Node | str) -> torch.Tensor:
    """The real tensor behind a get_attr node (or a dotted attribute path)."""
    if isinstance(node, fx.Node) and node.op != "get_attr":
        raise IncError(f"expected a get_attr node, got {node.op}", node=node)
    value = get_attr(gm, node if isinstance(node, str) else str(node.target))
    if not isinstance(value, torch.Tensor):
        raise IncError(f"attribute {node!s} is {type(value).__name__}, not a tensor")
    return value


def unique_name(gm: fx.GraphModule, hint: str) -> str:
    """A root attribute name that is not taken: `hint`, `hint_1`, ... (a counter per hint, so no scan)."""
    base = re.sub(r"\W+", "_", hint).strip("_") or "attr"
    base = base if not base[0].isdigit() else "_" + base
    counters = gm.meta.setdefault("inc", {}).setdefault("names", {})
    number = counters.get(base, 0)
    name = base if number == 0 else f"{base}_{number}"
    while hasattr(gm, name):
        number += 1
        name = f"{base}_{number}"
    counters[base] = number + 1
    return name


def set_tensor(gm: fx.GraphModule, name_hint: str, tensor: torch.Tensor, buffer: bool = True) -> str:
    """Register a new tensor at the root under a unique name made from `name_hint`; returns the name.

    `buffer=False` registers a parameter, trainable if the dtype can be. Existing tensors are never overwritten, so a
    weight that the user's model or a tied layer shares stays as it was.
    """
    name = unique_name(gm, name_hint)
    if not buffer:
        grad = tensor.is_floating_point() or tensor.is_complex()
        tensor = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=grad)
        gm.register_parameter(name, tensor)
    else:
        gm.register_buffer(name, tensor.detach() if tensor.requires_grad else tensor)
    return name


def set_module(gm: fx.GraphModule, name_hint: str, module: nn.Module) -> str:
    """Register a new submodule at the root under a unique name; returns the name."""
    name = unique_name(gm, name_hint)
    gm.add_module(name, module)
    return name


def view_key(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same part of the same memory, read in the same order."""
    return storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def storage_key(tensor: torch.Tensor) -> Any:
    """Equal for tensors that share memory. Falls back to identity where a tensor has no storage of its own."""
    try:
        storage = tensor.untyped_storage()
        if isinstance(tensor, FakeTensor) or tensor.is_meta or storage.nbytes() == 0:
            return ("id", id(tensor))
        return (tensor.device, storage.data_ptr())
    except (NotImplementedError, RuntimeError):  # sparse or opaque tensors
        return ("id", id(tensor))


def written_args(node: fx.Node) -> list[fx.Node]:
    """The arguments that this call writes to, from the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    found = []
    for i, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(arg.name)
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found


def mutated_attrs(gm: fx.GraphModule) -> set[str]:
    """Attributes the graph writes to (the `copy_` nodes at its end), and their aliases. Never fold or quantize them."""
    direct = {str(w.target) for n in gm.graph.nodes for w in written_args(n) if w.op == "get_attr"}
    if not direct:
        return set()
    keys = {storage_key(get_tensor(gm, name)) for name in direct}
    attrs = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
    tensors = ((name, get_attr(gm, name)) for name in attrs)
    return direct | {name for name, t in tensors if isinstance(t, torch.Tensor) and storage_key(t) in keys}


def is_contiguous(x: Any) -> bool:
    """Whether a fake value is a contiguous tensor: from its strides as text, since comparing symbols would guard."""
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        return False
    return list(map(str, x.stride())) == list(map(str, x.new_empty(x.shape).stride()))


# ----------------------------------------------------------------------------------------------------------- edits
def _fake_mode(gm: fx.GraphModule, values: Iterable[Any]) -> FakeTensorMode:
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    for node in gm.graph.nodes:  # ends at the first tensor, so this costs nothing in practice
        if isinstance(val(node), FakeTensor):
            return val(node).fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_call(gm: fx.GraphModule, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run `target` on the fake values of `args`/`kwargs` (which hold nodes). IncError if an argument has none."""
    values: list[Any] = []

    def value_of(node: fx.Node) -> Any:
        if "val" not in node.meta:
            raise IncError("a node without a fake value cannot be used as an argument", node=node)
        values.append(node.meta["val"])
        return node.meta["val"]

    args, kwargs = fx.map_arg((args, kwargs), value_of)
    with enable_python_dispatcher(), _fake_mode(gm, values), torch.no_grad():  # torch 2.8: views of symbolic sizes
        return target(*args, **kwargs)


def _stamp(node: fx.Node, like: fx.Node | None) -> None:
    if like is not None:
        for key in ("nn_module_stack", "stack_trace"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
    if (name := _PASS.get()) is not None:
        inc_meta(node).setdefault("provenance", []).append(name)


def _insertion_point(gm: fx.GraphModule, before: fx.Node | None, after: fx.Node | None) -> Any:
    if (before is None) == (after is None):
        raise IncError("give exactly one of before= and after=")
    return gm.graph.inserting_before(before) if after is None else gm.graph.inserting_after(after)


def insert_call(
    gm: fx.GraphModule,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    before: fx.Node | None = None,
    after: fx.Node | None = None,
    like: fx.Node | None = None,
    name: str | None = None,
) -> fx.Node:
    """Insert `target(*args, **kwargs)` before or after a node and fill in its fake value.

    `like` gives the module path and stack trace (default: the node inserted next to). `name` is a hint for the node's
    name. Raises what the operator's fake implementation raises, and then inserts nothing.
    """
    kwargs = kwargs or {}
    value = fake_call(gm, target, args, kwargs)
    with _insertion_point(gm, before, after):
        node = gm.graph.create_node("call_function", target, tuple(args), dict(kwargs), name)
    node.meta["val"] = value
    _stamp(node, like if like is not None else (before or after))
    return node


def insert_module(
    gm: fx.GraphModule,
    name_hint: str,
    module: nn.Module,
    arg: fx.Node,
    *,
    before: fx.Node | None = None,
    after: fx.Node | None = None,
    like: fx.Node | None = None,
) -> fx.Node:
    """Register `module` under a unique name and call it on `arg`. The module must give back a value like its input."""
    with _insertion_point(gm, before, after):
        node = gm.graph.create_node("call_module", set_module(gm, name_hint, module), (arg,), {})
    node.meta["val"] = val(arg)
    _stamp(node, like if like is not None else arg)
    return node


def insert_get_attr(gm: fx.GraphModule, before: fx.Node, name: str) -> fx.Node:
    """Insert a read of the tensor attribute `name` before a node. IncError if there is no such tensor."""
    tensor = get_tensor(gm, name)
    with gm.graph.inserting_before(before):
        node = gm.graph.create_node("get_attr", name, (), {})
    mode = _fake_mode(gm, [val(before)])
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    _stamp(node, None)
    return node


def replace_uses(old: fx.Node, new: fx.Node, only: Iterable[fx.Node] | None = None) -> int:
    """Make the users of `old` (all, or `only` these) use `new`; `new` itself keeps `old`. Returns how many changed."""
    users = [u for u in (old.users if only is None else only) if u is not new and u in old.users]
    for user in users:
        user.replace_input_with(old, new)
    return len(users)


@collector_paused()
def erase_dead(gm: fx.GraphModule) -> bool:
    """Remove nodes without effect, then attributes and submodules nobody reads; recompile. True if a node went.

    Linear, but over the whole graph: call it once, at the end of a pass. Within `code_later` it does not recompile.
    """
    changed = gm.graph.eliminate_dead_code()
    used = {n.target for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    roots = set(used)
    for name in used:
        while "." in name:
            name = name.rpartition(".")[0]
            roots.add(name)
    _prune(gm, "", used, roots)
    if not _CODE_LATER.get():
        gm.recompile()
    return changed


def _prune(module: nn.Module, prefix: str, used: set[str], roots: set[str]) -> None:
    for table in (module._parameters, module._buffers):
        for name in [n for n in table if prefix + n not in used]:
            del table[name]
            module._non_persistent_buffers_set.discard(name)
    for name in [n for n, v in vars(module).items() if isinstance(v, torch.Tensor) and prefix + n not in used]:
        delattr(module, name)
    for name in list(module._modules):
        path = prefix + name
        if path not in roots:
            del module._modules[name]
        elif path not in used and (child := module._modules[name]) is not None:  # on the way to something used
            _prune(child, path + ".", used, roots)
