"""Quantization-aware training: `prepare_qat`, the user's own training loop, `convert`.

Layer by layer (see `qat_layer`): the model and its layers stay the user's own objects. What each layer is trained for
is read from the same annotated graph that post-training quantization makes of it, and `convert` goes its way, with the
scales of training where calibration would have been. With example inputs: see `qat_graph`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from inc_graph.errors import ConfigError, IncWarning
from inc_graph.export import check_model, refuse_quantized, unwrap
from inc_graph.fake_quantizer import FakeQuantizer, refuse_untrained, unseen
from inc_graph.quantization import module_scope, qat_graph
from inc_graph.quantization.layers import call_every_layer, leaves, own_copy
from inc_graph.quantization.predicates import bind_predicates, layers_of
from inc_graph.quantization.qat_checkpoint import check_loading, leave_loading
from inc_graph.quantization.qat_guard import guard, unguard
from inc_graph.quantization.qat_layer import (
    LayerQuantizers,
    TrainingOptions,
    is_trained,
    make_quantizers,
    put_in,
    refuse_bad_weight,
    take_out,
    tell,
)
from inc_graph.quantization.qat_mapping import recipe_for
from inc_graph.recipe import Recipe
from inc_graph.registry import BACKENDS
from inc_graph.report import OpLine
from inc_graph.trained_modules import Norm
from inc_graph.utils.device import choose_backend, detect_device

__all__ = ["convert", "freeze_batch_norm", "freeze_observers", "is_prepared", "prepare"]

_MARK = "_inc_qat"


@dataclass
class _Facts:
    """What prepare leaves on the model for convert."""

    recipe: Recipe
    floats: list[OpLine]
    flags: list[tuple[nn.Module, str, Any]] = field(default_factory=list)  # (module, attribute, value before)


def prepare(
    model: nn.Module,
    mapping: Any,
    inplace: bool,
    *,
    example_inputs: Any,
    dynamic_shapes: Any,
    learn_scales: bool,
    freeze_after: int | None,
    check_finite: bool,
    backend: str,
) -> nn.Module:
    """See `quantize.prepare_qat`."""
    model = unwrap(model)
    if isinstance(model, nn.Module) and is_prepared(model):
        raise ConfigError("the model is prepared for training already", hint="train it, then call convert")
    if not isinstance(model, nn.Module) or isinstance(model, type):
        check_model(model)
    refuse_quantized(model)
    _check_options(learn_scales, freeze_after, check_finite)
    if dynamic_shapes is not None and example_inputs is None:
        raise ConfigError("dynamic_shapes cannot be used here: they need example_inputs", hint="give both")
    if not model.training:
        hint = "call model.train() first; layers that are to keep their mode can be set back afterwards"
        raise ConfigError(f"the model ({type(model).__name__}) is in eval mode", hint=hint)
    name, note = choose_backend(backend, detect_device(model))
    if note:
        warnings.warn(note, IncWarning, stacklevel=3)
    recipe, predicates = recipe_for(mapping, name, BACKENDS.get(name).supported())
    if example_inputs is not None:
        how = qat_graph.options(learn_scales, freeze_after, check_finite)
        return qat_graph.prepare(model, recipe, predicates, inplace, example_inputs, dynamic_shapes, how)
    recipe = bind_predicates(recipe, predicates, layers_of(model))
    options = TrainingOptions(learn_scales, freeze_after, check_finite)
    plan, floats = module_scope.look(model, recipe)
    made = {paths[0]: make_quantizers(model.get_submodule(paths[0]), leaf, options) for paths, leaf in plan if leaf}
    if not any(q.input or q.weight for q in made.values()):
        reasons = (
            "; ".join(dict.fromkeys(f"{f.op}: {f.detail}" for f in floats)) or "it has no Linear, Conv or Embedding"
        )
        raise ConfigError(f"the mapping matches nothing that can be trained ({reasons})", hint="see the reasons")
    if not inplace:
        model = own_copy(model)
    for path, quantizers in made.items():
        put_in(model.get_submodule(path), quantizers)
    model.__dict__[_MARK] = _Facts(recipe, floats, call_every_layer(model, LayerQuantizers))
    guard(model)
    check_loading(model)
    return model


def _check_options(learn_scales: Any, freeze_after: Any, check_finite: Any) -> None:
    for name, value in (("learn_scales", learn_scales), ("check_finite", check_finite)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, not {value!r}")
    whole = isinstance(freeze_after, int) and not isinstance(freeze_after, bool)
    if freeze_after is not None and not (whole and freeze_after > 0):
        raise ConfigError(f"freeze_after must be a positive number of batches or None, not {freeze_after!r}")


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_qat` has prepared this model."""
    return _MARK in model.__dict__ or qat_graph.is_prepared(model)


def freeze_observers(model: nn.Module) -> None:
    """Keep the ranges of activations, and learned scales, as they are from now on.

    Raises:
        ConfigError: the model is not prepared for training.
        CalibrationError: no range has seen a training batch; nothing is frozen.

    Warns:
        IncWarning: a layer has seen no training batch; it stays as it is.
    """
    model = unwrap(model)
    if not is_prepared(model):
        raise ConfigError("the model is not prepared for training", hint="prepare_qat(model, mapping) does it")
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantizer)]
    empty = [q for q in quantizers if not q.seen]
    if empty and not any(q.seen for q in quantizers if q.what == "input"):
        raise unseen(empty[0])
    if empty:
        names = ", ".join(dict.fromkeys(q.path for q in empty))
        warnings.warn(f"no training batch has reached {names}: not frozen", IncWarning, stacklevel=2)
    for quantizer in quantizers:
        if quantizer.seen:
            quantizer.freeze()


def freeze_batch_norm(model: nn.Module) -> None:
    """Let the batch norms of a graph in training normalize by their running statistics, which stay as they are now.

    Raises:
        ConfigError: the model is no graph that is prepared for training, or has no batch norm.
    """
    model = unwrap(model)
    found = [m for m in model.modules() if isinstance(m, Norm)]
    if not qat_graph.is_prepared(model) or not found:
        why = "has no batch norm" if qat_graph.is_prepared(model) else "is no graph that is prepared for training"
        raise ConfigError(f"the model {why}", hint="layer by layer, call eval() of the batch norms themselves")
    for norm in found:
        norm.freeze()


# ------------------------------------------------------------------------------------------------------------- convert
def convert(model: nn.Module, backend: str | None, inplace: bool) -> nn.Module:
    """The trained model as post-training quantization would give it, with the scales of training.

    A layer whose input no training batch reached stays float, and the report says so.

    Raises:
        CalibrationError: no layer has seen a training batch.
        TrainingError: a weight is not finite; names the layer.
    """
    if qat_graph.is_prepared(model):
        return qat_graph.convert(model, backend)
    if not inplace:
        model = own_copy(model)
    facts: _Facts = model.__dict__[_MARK]
    layers = {path: m for path, m in model.named_modules() if is_trained(m)}
    for path, layer in layers.items():
        refuse_bad_weight(layer, path)
    refuse_untrained([q for m in layers.values() if (q := _own(m).input) is not None])
    modes = [(m, m.training) for m in model.modules()]
    unguard(model)
    leave_loading(model)
    quantizers = {path: take_out(layer) for path, layer in layers.items()}
    prepared = model
    try:
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncWarning)  # of rules: said when it was prepared
            prepared = module_scope.prepare(model, facts.recipe, inplace=True)
        for leaf, paths in leaves(prepared).items():
            known = [quantizers[p] for p in paths if p in quantizers]
            tell(leaf, known[0])
        made = module_scope.convert(prepared, backend, inplace=True)
    except BaseException:
        if module_scope.is_prepared(prepared):
            module_scope.undo(prepared)
        for path, layer in layers.items():
            put_in(layer, quantizers[path])
        guard(model)
        check_loading(model)
        for module, mode in modes:
            module.training = mode
        raise
    made.__dict__.pop(_MARK, None)
    return made


def _own(layer: nn.Module) -> LayerQuantizers:
    return next(m for m in layer.children() if isinstance(m, LayerQuantizers))
