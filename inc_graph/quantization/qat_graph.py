"""Quantization-aware training of an exported graph: captured in training, annotated as inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import fx, nn

from inc_graph.capture import capture
from inc_graph.errors import CaptureError, ConfigError
from inc_graph.export import example_call
from inc_graph.fake_quantizer import FakeQuantizer, refuse_untrained
from inc_graph.graph import clone, get_level, module_path
from inc_graph.oppattern import pattern_of
from inc_graph.passmanager import Pipeline
from inc_graph.quantization.finish import finish, remember_buffers
from inc_graph.quantization.layers import own_copy
from inc_graph.quantization.model import QuantizedModel
from inc_graph.quantization.names import warn_prefixes
from inc_graph.quantization.pickling import refuse_pickling
from inc_graph.quantization.predicates import bind_predicates, operators_of
from inc_graph.quantization.qat_checkpoint import check_loading, leave_loading
from inc_graph.quantization.qat_guard import guard, unguard
from inc_graph.recipe import Recipe, set_recipe
from inc_graph.report import attribute_bytes, read_graph
from inc_graph.utils.progress import progress

__all__ = ["convert", "is_prepared", "options", "prepare"]


def options(learn_scales: bool, freeze_after: int | None, check: bool) -> str:
    """The pass that puts fake quantizers in, with its options, as text."""
    given = {"learn_scales": learn_scales, "freeze_after": freeze_after, "check": check}
    default = {"learn_scales": False, "freeze_after": None, "check": True}
    text = ",".join(f"{k}={str(v).lower()}" for k, v in given.items() if v != default[k])
    return "insert-fake-quant" + (f"{{{text}}}" if text else "")


def prepare(
    model: nn.Module, recipe: Recipe, predicates: Mapping[int, Any], inplace: bool, inputs: Any, shapes: Any, how: str
) -> fx.GraphModule:
    """The trainable graph of a model in train mode; its parameters and buffers are the model's, with `inplace`.

    Raises:
        CaptureError: torch.export cannot capture it.
        ConfigError: nothing in it is quantized, or something in it is random in a way that is not known.
    """
    if isinstance(model, fx.GraphModule):
        hint = "give the model that it was made from, with the example inputs"
        raise ConfigError("a graph keeps the mode in which it was captured", hint=hint)
    if not inplace:
        model = own_copy(model)
    for path, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None and getattr(module, "momentum", 0.1) is None:
            hint = "give it a momentum, such as 0.1; or leave out example_inputs"
            raise ConfigError("momentum=None, a mean over all batches, is not known in a graph", module=path, hint=hint)
    args, kwargs = example_call(model, inputs)
    with progress("export") as step:
        step(type(model).__name__)
        try:
            gm = capture(model, args, kwargs, shapes, training=True)
        except CaptureError as e:
            hint = f"{e.hint}; or leave out example_inputs: then it is trained layer by layer"
            raise CaptureError(e.message, node=e.node, module=e.module, hint=hint) from e
    before = attribute_bytes(gm)
    recipe = bind_predicates(recipe, predicates, operators_of(gm))
    passes = f"canonicalize{{trainable=true}},inference-form,annotate,{how}"
    set_recipe(gm, replace(recipe, prepare=passes))
    pipeline = Pipeline.parse(passes)
    with progress("prepare", len(pipeline.passes)) as step:
        result = pipeline.run(gm, on_pass=step)
    gm = result.graph
    if not any(isinstance(m, FakeQuantizer) for m in gm.modules()):
        _, floats = read_graph(gm)
        found = list(dict.fromkeys(f"{f.op}: {f.detail}" for f in floats))[:5]
        reasons = "; ".join(found) or "no operator that it speaks of has a format"
        raise ConfigError(f"the mapping matches nothing that can be trained ({reasons})", hint="see the reasons")
    warn_prefixes(recipe, filter(None, (module_path(n) for n in gm.graph.nodes if pattern_of(n))), stacklevel=4)
    _share_buffers(gm, model)
    remember_buffers(gm)
    refuse_pickling(gm)
    gm.meta["inc"]["bytes_before"] = before
    gm.meta["inc"]["timings"] = [list(t) for t in result.timings]
    guard(gm)
    check_loading(gm)
    gm._register_deepcopy_hook(guard)  # fx does not copy such hooks
    return gm.train()


def _share_buffers(gm: fx.GraphModule, model: nn.Module) -> None:
    """What the graph writes to is the model's own, as its parameters are: capture has made copies."""
    copies = dict(gm.named_buffers())
    for path, own in model.named_buffers():
        if path in copies:
            parent, _, name = path.rpartition(".")
            gm.get_submodule(parent)._buffers[name] = own


def is_prepared(model: nn.Module) -> bool:
    """Whether this is a graph in training."""
    return isinstance(model, fx.GraphModule) and "inc" in model.meta and get_level(model) == "trainable"


def convert(model: nn.Module, backend: str | None) -> QuantizedModel:
    """The model that the graph was trained to be; the graph stays as it is.

    Raises:
        CalibrationError: nothing has seen a training batch, or a value has not; names it.
        TrainingError: a weight is not finite; names the layer.
    """
    gm = clone(cast(fx.GraphModule, model))
    refuse_untrained([m for m in gm.modules() if isinstance(m, FakeQuantizer)])
    observed = Pipeline.parse("keep-trained").run(gm).graph
    unguard(observed)
    leave_loading(observed)
    return finish(observed, backend)
