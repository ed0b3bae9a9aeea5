"""What cannot be quantized at all, told from the model itself before anything is done with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from inc_graph.errors import CaptureError, ConfigError
from inc_graph.graph import get_level

__all__ = ["check_model", "refuse_quantized"]

_FLOAT = "prepare the float model"


def check_model(model: Any, empty: bool = False) -> None:
    """Refuse what cannot be quantized at all. CaptureError. `empty`: parameters may be on the meta device."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise CaptureError(f"expected a model, got the class {model.__name__}", hint=f"make one: {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        hint = "give the Python model that it was made from"
        raise CaptureError(f"{type(model).__name__} is TorchScript, which torch.export does not read", hint=hint)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise CaptureError(f"tensor {name!r} has no shape yet", hint="run the model once on an input")
        if tensor.is_meta and not (empty and isinstance(tensor, nn.Parameter)):
            raise CaptureError(
                f"tensor {name!r} is on the meta device and has no values", hint="load the weights first"
            )
        if tensor.is_mkldnn:
            raise CaptureError(f"tensor {name!r} is in mkldnn layout", hint="give the model from before to_mkldnn()")
    # what torch.export returns has no modes, whatever its flag says, and refuses eval()
    fixed = isinstance(model, fx.GraphModule) and ("inc" in model.meta or "train" in vars(model))
    trained = next((name for name, m in model.named_modules() if m.training), None)
    if trained is not None and not fixed:
        raise CaptureError("the model is in training mode", module=trained, hint="call model.eval() first")
    for gm in model.modules():
        if isinstance(gm, fx.GraphModule) and "train" in vars(gm):
            _refuse_training(gm)


def _refuse_training(gm: fx.GraphModule) -> None:
    """A program holds the behaviour that the model had when it was exported; no flag changes it any more."""
    for node in gm.graph.nodes:
        if (why := _training(node)) is not None:
            raise CaptureError(
                f"the program was exported in training mode: {node.target} {why}",
                node=node, hint="call model.eval(), then torch.export.export it again",
            )  # fmt: skip


def _training(node: fx.Node) -> str | None:
    """What this call does in training only, None if it is as in inference."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    given: dict[str, Any] = {}
    for i, a in enumerate(node.target._schema.arguments):
        given[a.name] = node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
    if (given.get("dropout_p") or 0) > 0:  # attention has no flag
        return "drops values at random"
    if "batch_norm_with_update" in node.target.name():
        return "uses the statistics of the batch"
    flag = next((given[n] for n in ("train", "training", "use_input_stats") if n in given), False)
    if flag is False or (flag is None and node.target is not torch.ops.aten.native_dropout.default):
        return None
    if "momentum" in given:  # a norm without running statistics has no other way in inference either
        return None if given.get("running_mean") is None else "uses the statistics of the batch"
    if given.get("p") == 0 or given.get("dropout") == 0:
        return None
    return "is random"


def refuse_quantized(model: nn.Module) -> None:
    """ConfigError if a graph in the model holds observers or quantized values: nothing is quantized twice."""
    for gm in model.modules():
        if not isinstance(gm, fx.GraphModule):
            continue
        level = get_level(gm)
        if gm is model and level in ("annotated", "qdq", "lowered"):
            raise ConfigError(f"a float model is needed, this graph is at level {level!r}", hint=_FLOAT)
        if level in ("qdq", "lowered") or any(_is_quantized(n) for n in gm.graph.nodes):
            raise ConfigError("the model is converted already", hint=_FLOAT)
        if level != "float":
            hint = "run calibration data through it, then call convert"
            raise ConfigError("the model is prepared already", hint=hint)


def _is_quantized(node: fx.Node) -> bool:
    """Whether the node calls an operator of the dialect, or of a backend of ours."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace.split("_")[0] == "inc"
