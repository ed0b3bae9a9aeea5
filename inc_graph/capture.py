"""From `nn.Module` to the normal form: one functional aten graph with module paths and fake values on its nodes.

Normal form
  * aten operators, functional; `linear`, `conv*`, `sdpa`, `layer_norm`, ... whole (`run_decompositions({})`);
  * views of what has no fixed memory layout are `reshape` - see `layouts.py`;
  * autocast and grad-mode regions written out: autocast as explicit casts, so a flat walk sees every operator and each
    keeps the path of the module that made it (the exporter's own inlining loses it) - see `regions.py`;
  * no metadata assertions (they would pin dtypes), no guards module, no identity `clone`; no `detach` where no gradient
    is wanted - in training all of them, with one for what leaves a region without gradients;
  * parameters, buffers and constants are read with get_attr at their original paths and are the user's own tensors;
    only buffers that the graph writes to are private copies, so that running it leaves the user's model alone;
  * what the graph writes to a buffer is detached: buffers outlive a call;
  * input trees as in the model's `forward`; shapes are checked on each call against what was captured - see
    `inputs.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from inc_graph.errors import CaptureError
from inc_graph.graph import (
    clone,
    dtype,
    erase_dead,
    fake_call,
    get_attr,
    insert_call,
    is_float,
    module_path,
    module_type,
    mutated_attrs,
    replace_uses,
    set_level,
    storage_key,
    val,
)
from inc_graph.inputs import describe_inputs, watch_inputs
from inc_graph.layouts import settle_views
from inc_graph.quiet import quiet_torch
from inc_graph.recurrent_capture import WholeRecurrent, name_recurrent
from inc_graph.regions import inline_regions
from inc_graph.trained_capture import keep_gradients, settle_detach

aten = torch.ops.aten

_KEPT_META = frozenset({"val", "nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack", "custom"})
_HINTS = (
    (("Constraints violated", "dynamic_shapes"), "make dynamic_shapes agree with what the model allows"),
    (
        ("data-dependent", "GuardOnDataDependent", "DynamicControlFlow", "ataDependent"),
        "the model decides on tensor values in Python: write that part with torch.cond or torch.where, or leave out "
        "the example inputs, so that it is quantized layer by layer",
    ),
    (
        ("not a known type", "register a pytree"),
        "take and return tensors in tuples, lists and dicts (transformers: use_cache=False), or register the type as a "
        "pytree node",
    ),
    (
        ("Current active mode",),
        "torch 2.8 cannot export torch.vmap, which transformers makes causal masks with: give the model an "
        "attention_mask of four dimensions, or use a later torch",
    ),
    (("missing", "unexpected keyword", "positional argument"), "example inputs must be what model.forward takes"),
)
_DEFAULT_HINT = (
    "change the line named above so that torch.export can trace it, or leave out the example inputs, so that the model "
    "is quantized layer by layer"
)


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    training: bool = False,
) -> fx.GraphModule:
    """Export `model` on example inputs to a graph module in normal form, level "float".

    The model is captured as it behaves in inference, whatever its flags, and is left exactly as it was; its parameters
    are shared, not copied. `training=True` captures it with the flags it has, and with gradients: CaptureError if it
    has a `torch.autograd.Function`, whose backward would be lost.
    `dynamic_shapes` goes to `torch.export.export`. CaptureError if the model cannot be exported: it carries the
    exporter's reason, the module path where that is known, and what to do.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected an nn.Module, got {type(model).__name__}")
    args = tuple(args) if isinstance(args, list | tuple) else (args,)
    args, kwargs = _distinct(model, (args, dict(kwargs or {})))
    with _captured_as(model, training):
        try:
            with quiet_torch(), keep_gradients() if training else WholeRecurrent():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            if training:
                settle_detach(program)
            inline_regions(program, training)
            program = program.run_decompositions({})
            with_guards = "check_guards" in inspect.signature(program.module).parameters
            exported = program.module(check_guards=False) if with_guards else program.module()
        except Exception as error:
            raise _explain(model, error) from error
    gm = _normalize(exported, training)
    gm.meta["inc"]["inputs"] = describe_inputs(gm, program.range_constraints, model)
    watch_inputs(gm)
    gm._register_deepcopy_hook(watch_inputs)  # fx copies its own hooks only
    return gm


def _distinct(model: nn.Module, inputs: Any) -> Any:
    """Inputs of which none is another one, or a tensor of the model: the exporter would take the two for one value."""
    seen = {id(t) for t in (*model.parameters(), *model.buffers())}

    def own(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and id(x) in seen:
            return x.detach().clone().requires_grad_(x.requires_grad)
        seen.add(id(x))
        return x

    return pytree.tree_map(own, inputs)


@contextlib.contextmanager
def _captured_as(model: nn.Module, training: bool) -> Iterator[None]:
    """Inference flags and modes within the block; flags are set one by one, as `eval()` may be overridden."""
    flags = [(m, m.training) for m in model.modules()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(warnings.catch_warnings())  # torch warns of torch when it copies a pytree
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
        for device in ("cpu", "cuda"):  # a region the caller stands in is not a part of the model
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        try:
            if not training:
                for module, _ in flags:
                    module.training = False
            yield
        finally:
            for module, flag in flags:
                module.training = flag


# ----------------------------------------------------------------------------------------------------- normal form
def _normalize(exported: fx.GraphModule, training: bool) -> fx.GraphModule:
    gm = clone(exported)  # a plain GraphModule, without the exporter's hooks and overridden train()/eval()
    for key in ("train", "eval", "validate_inputs", "range_constraints", "shape_env"):
        gm.__dict__.pop(key, None)
    gm._forward_pre_hooks.clear()
    gm._forward_pre_hooks_with_kwargs.clear()
    gm._forward_hooks.clear()
    gm._forward_hooks_always_called.clear()
    gm.meta = {"inc": {}}
    set_level(gm, "float")
    name_recurrent(gm)
    _buffers_for_constants(gm)
    _tidy(gm, training)
    _complete_meta(gm)
    settle_views(gm)
    if training:
        _read_copies(gm)
    write_values(gm)
    erase_dead(gm)
    own_mutated(gm)
    return gm


def _buffers_for_constants(gm: fx.GraphModule) -> None:
    """Lifted constants are plain attributes: make them buffers, so that they move and are saved with the rest."""
    for module in gm.modules():
        for name in [n for n, v in vars(module).items() if isinstance(v, torch.Tensor)]:
            tensor = module.__dict__.pop(name)
            module.register_buffer(name, tensor.detach() if tensor.requires_grad else tensor)


def _tidy(gm: fx.GraphModule, training: bool) -> None:
    """Remove assertions on metadata and nodes that compute nothing in a functional graph."""
    identity = {aten.alias.default, aten.lift_fresh.default}
    if not training:  # in training, detach stops the gradient
        identity.add(aten.detach.default)
    leaving = _leaving(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            gm.graph.erase_node(node)
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
        elif node.target in identity or (node not in leaving and _keeps_layout(node)):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)


def _leaving(graph: fx.Graph) -> set[fx.Node]:
    """Values whose memory the caller, or a buffer, gets to see: the graph is functional but for these."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            if user.op == "output" or user.target is aten.copy_.default or (user in found and _may_alias(user)):
                found.add(node)
    return found


def _may_alias(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # getitem, control flow
        return True
    return any(r.alias_info is not None for r in schema.returns)


def _keeps_layout(node: fx.Node) -> bool:
    """A clone that has the strides of its source."""
    if node.target is not aten.clone.default or node.kwargs:
        return False
    after, before = val(node), val(node.all_input_nodes[0])
    if not isinstance(after, torch.Tensor) or not isinstance(before, torch.Tensor):
        return False
    return list(map(str, after.stride())) == list(map(str, before.stride()))  # str: comparing symbols would guard


def _complete_meta(gm: fx.GraphModule) -> None:
    """`val` on every node but the output (None where there is no value); exporter's bookkeeping dropped."""
    for node in gm.graph.nodes:
        for key in [k for k in node.meta if k not in _KEPT_META]:
            del node.meta[key]
        if "custom" in node.meta:
            custom = {k: v for k, v in (node.meta.pop("custom") or {}).items() if not k.startswith("_torchdynamo")}
            node.meta.update({"custom": custom} if custom else {})
        if not module_path(node) and module_type(node) is None:  # nodes of the exporter itself carry a made-up module
            node.meta.pop("nn_module_stack", None)
        if "val" in node.meta or node.op == "output":
            continue
        schema = getattr(node.target, "_schema", None)
        if node.target is aten.copy_.default:
            node.meta["val"] = val(node.all_input_nodes[0])
        elif node.op == "call_function" and schema is not None and schema.returns:
            node.meta["val"] = fake_call(gm, node.target, node.args, node.kwargs)
        else:
            node.meta["val"] = None


def _read_copies(gm: fx.GraphModule) -> None:
    """Let written buffers be read through a copy: autograd refuses a saved value that is written to afterwards."""
    written = mutated_attrs(gm)
    for node in gm.graph.find_nodes(op="get_attr"):
        readers = [u for u in node.users if u.target is not aten.copy_.default]
        if node.target in written and readers and is_float(node):
            replace_uses(node, insert_call(gm, aten.clone.default, (node,), before=readers[0]), readers)


def write_values(gm: fx.GraphModule) -> None:
    """Detach what buffers take: they outlive the call whose history it carries. Does nothing the second time."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        target, value = node.args[:2]
        kind = dtype(value) if isinstance(value, fx.Node) and value.target is not aten.detach.default else None
        if target.op == "get_attr" and kind is not None and (kind.is_floating_point or kind.is_complex):
            new = insert_call(gm, aten.detach.default, (value,), before=node, like=value)
            node.args = (target, new, *node.args[2:])


def own_mutated(gm: fx.GraphModule) -> None:
    """Give buffers the graph writes to (and tensors that alias them) memory of their own.

    A parameter that the graph writes to is for inference: autograd allows no write to one that is trained.
    """
    copies: dict[Any, torch.UntypedStorage] = {}
    for path in sorted(mutated_attrs(gm)):
        prefix, _, leaf = path.rpartition(".")
        owner, old = gm.get_submodule(prefix), get_attr(gm, path)
        key = storage_key(old)
        if key not in copies:
            copies[key] = old.untyped_storage().clone()
        new = torch.empty(0, dtype=old.dtype, device=old.device)
        new.set_(copies[key], old.storage_offset(), old.size(), old.stride())
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        else:
            owner._buffers[leaf] = new


# ------------------------------------------------------------------------------------------------------------ errors
def _explain(model: nn.Module, error: Exception) -> CaptureError:
    text = f"{type(error).__name__}: {error}"
    hint = next((h for words, h in _HINTS if any(w in text for w in words)), _DEFAULT_HINT)
    said = error.message if isinstance(error, CaptureError) else str(error)
    if isinstance(error, CaptureError) and error.hint:
        hint = error.hint
    lines = [line.rstrip() for line in said.strip().splitlines() if line.strip()]
    reason = "\n  ".join(lines[:12]) or type(error).__name__
    path, where = _failing_module(model, error)
    at = f" (at {where})" if where else ""
    return CaptureError(f"torch.export cannot capture {type(model).__name__}{at}: {reason}", module=path, hint=hint)


def _failing_module(model: nn.Module, error: BaseException) -> tuple[str | None, str]:
    """Path of the innermost of the model's modules on the error's stack, and the line of its code that was running."""
    paths = {id(m): name for name, m in model.named_modules()}
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        e = todo.pop(0)
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        for frame, line in reversed(list(traceback.walk_tb(e.__traceback__))):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in paths:
                return paths[id(owner)] or None, f"{frame.f_code.co_filename}:{line}"
        todo += [e.__cause__, e.__context__]
    return None, ""
