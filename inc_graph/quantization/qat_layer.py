"""A layer in quantization-aware training: the user's own object, whose forward rounds its input and its weight.

The layer keeps its class, its name and its parameters. Its quantizers are in a submodule `fake_quant`; formats whose
scales are found anew in each step (MX, weights) have no state in them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inc_graph.calibrate import Observer
from inc_graph.errors import ConfigError, TrainingError
from inc_graph.fake_quantizer import FakeQuantizer
from inc_graph.finite import refuse_bad_gradients
from inc_graph.graph import get_attr, peek_meta
from inc_graph.learned_step import LearnedStep
from inc_graph.quantization.leaf import Leaf
from inc_graph.spec import QSpec
from inc_graph.trained_scales import TRAINED, TrainedObserver, quantizer_for

__all__ = [
    "NAME", "LayerQuantizers", "TrainingOptions", "is_trained", "make_quantizers", "put_in",
    "refuse_bad_weight", "take_out", "tell",
]  # fmt: skip

NAME = "fake_quant"
Run = Callable[[Any, Tensor, Tensor], Tensor]


class TrainingOptions:
    """What `prepare_qat` was told of training itself."""

    def __init__(self, learn_scales: bool, freeze_after: int | None, check: bool) -> None:
        self.learn_scales, self.freeze_after, self.check = learn_scales, freeze_after, check


class LayerQuantizers(nn.Module):
    """The quantizers of one layer, and what the layer does with what they give."""

    def __init__(self, input: FakeQuantizer | None, weight: FakeQuantizer | None, kind: str, path: str) -> None:
        super().__init__()
        self.input, self.weight = input, weight
        self.kind, self.path = kind, path

    @property
    def checking(self) -> FakeQuantizer | None:
        """The quantizer that speaks for the layer, where what is not finite is refused."""
        return next((q for q in (self.input, self.weight) if q is not None and q.check), None)


def _linear(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight, layer.bias)


def _conv(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return layer._conv_forward(x, weight, layer.bias)


def _embedding(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(x, weight, layer.padding_idx, None, 2.0, layer.scale_grad_by_freq, False)


_RUN: dict[str, Run] = {"linear": _linear, "transposed": _linear, "conv": _conv, "embedding": _embedding}


def kind_of(layer: nn.Module) -> str | None:
    """How a layer is computed; None where it is not known here."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "transposed" if type(layer).__name__ == "Conv1D" else None  # its weight is [in, out]


def _forward(self: Any, /, *args: Any, **kwargs: Any) -> Tensor:
    """Instead of the layer's own; its input may come by name, which is `input`, or `x` in a Conv1D."""
    own: LayerQuantizers = self._modules[NAME]
    name = "x" if own.kind == "transposed" else "input"
    if len(args) + len(kwargs) > 1:
        raise ConfigError("called with more than its input", module=own.path, hint="leave this layer float")
    if not args and name not in kwargs:
        raise TypeError(f"{type(self).__name__}.forward() needs one argument, {name!r}")
    x: Tensor = args[0] if args else kwargs[name]
    weight = self.weight.t() if own.kind == "transposed" else self.weight
    if own.weight is not None:
        weight = own.weight(weight)  # before the input, whose range is moved: it may be refused
    if own.input is not None:
        x = own.input(x)
    y = _RUN[own.kind](self, x, weight)
    if not torch.compiler.is_compiling() and (checking := own.checking) is not None:
        refuse_bad_gradients(y, own.path, checking.guard)
    return y


# --------------------------------------------------------------------------------------------------------- in and out
def make_quantizers(layer: nn.Module, leaf: Leaf, options: TrainingOptions) -> LayerQuantizers:
    """What the graph of a layer says is to be rounded.

    Raises:
        ConfigError: this layer, or this format, cannot be trained; names it.
    """
    kind = kind_of(layer)
    if kind is None:
        hint = "leave it float, or give example_inputs: in a graph it can be trained"
        raise ConfigError(f"{type(layer).__name__} cannot be trained by itself", module=leaf.path, hint=hint)
    gm: Any = leaf.inner
    anchor = next(n for n in gm.graph.nodes if "rule" in peek_meta(n))
    annotation = peek_meta(anchor).get("weight")
    weight = None
    if annotation is not None:
        tensor = layer.weight.t() if kind == "transposed" else layer.weight  # type: ignore[operator]
        weight = _quantizer(QSpec.from_json(annotation["spec"]), annotation["algorithm"], tensor, leaf.path, options)
    spec = _input_spec(gm)
    if spec is not None and spec.type.block is not None and kind == "conv":
        hint = "blocks of MX formats go along the inputs that a product sums over"
        raise ConfigError(f"{spec.qtype} is for linear layers, not for convolutions", module=leaf.path, hint=hint)
    source = None if spec is None else _quantizer(spec, "minmax", None, leaf.path, options)
    return LayerQuantizers(source, weight, kind, leaf.path)


def _quantizer(spec: QSpec, algorithm: str, weight: Any, path: str, options: TrainingOptions) -> FakeQuantizer:
    return quantizer_for(spec, algorithm, weight, path, options.learn_scales, options.freeze_after, options.check)


def _input_spec(gm: fx.GraphModule) -> QSpec | None:
    for node in gm.graph.nodes:
        for quant in peek_meta(node).get("quant", {}).values():
            return QSpec.from_json(quant["spec"])
    return None


def put_in(layer: nn.Module, quantizers: LayerQuantizers) -> None:
    """Let the layer round; the quantizers go where its weight is, and into its mode."""
    weight: Any = layer.weight
    quantizers.to(weight.device).train(layer.training)
    layer.add_module(NAME, quantizers)
    layer.__dict__["forward"] = functools.partial(_forward, layer)  # a bound method could not be pickled


def take_out(layer: nn.Module) -> LayerQuantizers:
    """The float layer again; gives what `put_in` takes."""
    del layer.__dict__["forward"]
    found: Any = layer._modules.pop(NAME)
    return found


def is_trained(module: nn.Module) -> bool:
    """Whether `put_in` has made this layer round."""
    return isinstance(module._modules.get(NAME), LayerQuantizers)


# ------------------------------------------------------------------------------------------------------------- convert
def tell(leaf: Leaf, quantizers: LayerQuantizers) -> None:
    """Give the observed graph of a layer what training has found, instead of calibration data.

    Raises:
        TrainingError: the weight is not finite.
    """
    gm: Any = leaf.inner
    source = quantizers.input
    for node in gm.graph.find_nodes(op="call_module"):
        old = get_attr(gm, node.target)
        if isinstance(old, Observer) and source is not None:
            new = TrainedObserver(old.qspec, source.params(), source.seen, old.node, quantizers.path)
            gm._modules[node.target] = new
    if isinstance(quantizers.weight, LearnedStep):
        anchor = next(n for n in gm.graph.nodes if "weight" in peek_meta(n))
        scale, zero = (None if t is None else t.detach().clone() for t in quantizers.weight.params())
        zero = scale.new_zeros(scale.shape, dtype=torch.int32) if zero is None else zero  # type: ignore[union-attr]
        gm.meta[TRAINED] = {anchor.name: (scale, zero.int())}


def refuse_bad_weight(layer: nn.Module, path: str) -> None:
    """TrainingError if training has ruined the weight."""
    weight: Any = layer.weight
    if not bool(weight.detach().isfinite().all()):
        raise TrainingError("the weight holds NaN or infinity", module=path, hint="go back to a checkpoint before that")
