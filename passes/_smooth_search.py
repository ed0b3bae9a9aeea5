"""The error of layers whose input and weight are both scaled and rounded, as they will be, on kept data.

Of a layer  ||Q(X / s) Q(W s)^T - X W^T||^2 / ||X W^T||^2,  without what a corrected bias takes back. A static range is
that of all calibration data where it is the least and the greatest value; other estimators see the kept data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.errors import SpecError
from inc_graph.graph import get_tensor
from inc_graph.numerics import affine_qparams, choose_qparams, fake_quantize
from inc_graph.oppattern import argument, pattern_of
from inc_graph.options import make_estimator, needs_inputs, parse_algorithm
from inc_graph.passes._codes import codes_of_weight, needs_zero_point
from inc_graph.passes._smooth_sites import Format, Group, Site, weight_index
from inc_graph.passes.qparams.smooth import combined, smooth_scale

__all__ = ["Judge", "extremes", "rounded_input", "rounded_weight"]


def extremes(gm: fx.GraphModule, group: Group) -> tuple[Tensor, Tensor]:
    """(largest absolute input, largest absolute weight) of each channel, over all layers: float32 [channels]."""
    ranges = [torch.maximum(low.abs(), high.abs()) for low, high in (s.stats.ranges() for s in group.sites)]
    weights = []
    for site in group.sites:
        for layer in site.layers:
            weight = weight_of(gm, layer).detach().float().abs()
            index = weight_index(layer, site.channels)
            if index.numel() == site.channels:  # the channels lie on one dimension
                weights.append(weight.amax([d for d in range(weight.ndim) if index.shape[d] == 1]))
                continue
            flat = weight.amax(list(range(2, weight.ndim))) if weight.ndim > 2 else weight
            found = flat.new_zeros(site.channels)
            weights.append(found.scatter_reduce_(0, index.reshape(flat.shape).flatten(), flat.flatten(), "amax"))
    x, w = (torch.stack([t.cpu() for t in ts]).amax(0) for ts in (ranges, weights))
    return group.together(x), group.together(w)


def weight_of(gm: fx.GraphModule, layer: fx.Node) -> Tensor:
    """The weight of a layer."""
    pattern = pattern_of(layer)
    assert pattern is not None and pattern.weight is not None
    return get_tensor(gm, argument(layer, pattern.weight)).detach()


class Judge:
    """The error of the layers of a group, as a function of alpha.

    Args:
        gm: Where the weights are.
        group: Its sites have kept data.
        outputs: Whether its error will be asked for.
    """

    def __init__(self, gm: fx.GraphModule, group: Group, outputs: bool = True) -> None:
        self.group, self.x_max, self.w_max = group, *extremes(gm, group)
        self.layers: list[tuple[Site, fx.Node, Tensor, list[Tensor], float]] = []
        for site in group.sites if outputs else ():
            data = site.stats.kept()
            for layer in site.layers:
                weight = weight_of(gm, layer).float()
                outputs = [run_layer(layer, x, weight) for x in data]
                power = sum(float(y.square().sum()) for y in outputs)
                self.layers.append((site, layer, weight, outputs, power))

    def scale(self, alpha: float | None) -> Tensor:
        """float32 [channels]; ones for None."""
        return torch.ones_like(self.x_max) if alpha is None else smooth_scale(self.x_max, self.w_max, alpha)

    def __call__(self, alpha: float | None) -> float:
        """The error, from those of the layers as `shared_criterion` says."""
        scale = self.scale(alpha)
        inputs: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        errors = []
        for site, layer, weight, outputs, power in self.layers:
            form = site.formats[layer]
            key = (site, str(form.activation), form.estimator)
            if key not in inputs:
                inputs[key] = [rounded_input(x, scale, site, form) for x in site.stats.kept()]
            wide = weight * scale[weight_index(layer, len(scale))]
            codes = rounded_weight(wide, form)
            shift = _mean_shift(layer, codes - wide, [x for x, _ in inputs[key]]) if _corrected(form) else 0.0
            error = 0.0
            for (_, x), y in zip(inputs[key], outputs, strict=True):
                error += float((run_layer(layer, x, codes) - shift).sub_(y).square().sum())
            errors.append(error / power if power > 0 else 0.0)
        return combined(errors, self.group.sites[0].how.shared_criterion)


def run_layer(layer: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer gives for `x`, without its bias."""
    call: Any = layer.target
    return call(x, weight, None, *layer.args[3:], **{k: v for k, v in layer.kwargs.items() if k != "bias"})


def rounded_input(x: Tensor, scale: Tensor, site: Site, form: Format) -> tuple[Tensor, Tensor]:
    """(x / scale, the same rounded as the layer will read it)."""
    rank = x.ndim
    shape = [-1 if d == site.axis % rank else 1 for d in range(rank)]
    x = x / scale.view(shape)
    spec = form.activation
    if spec is None:
        return x, x
    try:
        block = list(spec.block(rank))
    except SpecError:  # an axis that rows have not: a scale for each row
        block = [1] * (rank - 1) + [-1]
    if spec.dynamic:
        s, zero = choose_qparams(x, block, spec.qtype, spec.scheme)
    elif parse_algorithm(form.estimator)[0] == "minmax":
        low, high = (t.cpu() / scale for t in site.stats.ranges())
        s, zero = (t.view([1] * rank) for t in affine_qparams(low.amin(), high.amax(), spec.qtype, spec.scheme))
        block = [-1] * rank
    else:
        s, zero = make_estimator(form.estimator).estimate(x, spec)
    return x, fake_quantize(x, s, zero if needs_zero_point(spec, zero) else None, block, spec.qtype)


def rounded_weight(weight: Tensor, form: Format) -> Tensor:
    """The weight as it will be; one that is rounded against inputs is rounded to the nearest here."""
    annotation = dict(form.weight)
    if needs_inputs(annotation["algorithm"]):
        annotation["algorithm"] = "rtn"
    return codes_of_weight(weight, annotation).values()


def _corrected(form: Format) -> bool:
    return bool(form.weight.get("correct_bias"))


def _mean_shift(layer: fx.Node, error: Tensor, inputs: list[Tensor]) -> Tensor:
    """What the bias of a layer takes back: the mean of what the weight's error gives, of each output channel."""
    outputs = [run_layer(layer, x, error) for x in inputs]
    if outputs[0].ndim == 2:
        return outputs[0].mean(0) if len(outputs) == 1 else torch.cat(outputs).mean(0)
    total = torch.stack([y.mean([0, *range(2, y.ndim)]) for y in outputs]).mean(0)
    return total.view(1, -1, *[1] * (outputs[0].ndim - 2))
