"""The error of layers whose input and weight are both scaled and rounded, as they will be, on kept data.

Of a layer  ||Q(X / s) Q(W s)^T - X W^T||^2 / ||X W^T||^2,  without what a corrected bias takes back. Scales and static
ranges are found on one half of the calibration data and judged on the other: the more even the channels are, the more
of them leave their ranges when other data comes, which would not be seen on the same data. A range is the least and the
greatest value of that half; estimators of other kinds see what is kept of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from inc_graph.calibrate import RangeEstimator
from inc_graph.channel_stats import Without
from inc_graph.errors import SpecError
from inc_graph.graph import get_tensor
from inc_graph.numerics import affine_qparams, choose_qparams, fake_quantize
from inc_graph.oppattern import argument, pattern_of
from inc_graph.options import make_algorithm, make_estimator, needs_inputs, parse_algorithm
from inc_graph.passes._codes import codes_of_weight, needs_zero_point
from inc_graph.passes._smooth_sites import Format, Group, Site, weight_index
from inc_graph.passes.qparams.smooth import combined, smooth_scale
from inc_graph.spec import QSpec

__all__ = ["Judge", "largest_inputs", "largest_weights", "run_rounded"]


def largest_inputs(group: Group, half: int | None = None) -> Tensor:
    """The largest absolute input of each channel, over all sites: float32 [channels]."""
    ranges = [torch.maximum(low.abs(), high.abs()) for low, high in (s.stats.ranges(half) for s in group.sites)]
    return group.together(torch.stack([t.cpu() for t in ranges]).amax(0))


def largest_weights(gm: fx.GraphModule, group: Group) -> Tensor:
    """The largest absolute weight of each channel, over all layers: float32 [channels]."""
    found = []
    for site in group.sites:
        for layer in site.layers:
            weight = weight_of(gm, layer).float().abs().cpu()
            index = weight_index(layer, site.channels)
            if index.numel() == site.channels:  # the channels lie on one dimension
                found.append(weight.amax([d for d in range(weight.ndim) if index.shape[d] == 1]))
                continue
            flat = weight.amax(list(range(2, weight.ndim))) if weight.ndim > 2 else weight
            each = flat.new_zeros(site.channels)
            found.append(each.scatter_reduce_(0, index.reshape(flat.shape).flatten(), flat.flatten(), "amax"))
    return group.together(torch.stack(found).amax(0))


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
    """

    def __init__(self, gm: fx.GraphModule, group: Group) -> None:
        self.gm, self.group = gm, group
        self.w_max = largest_weights(gm, group)
        both = all(s.stats.two_halves for s in group.sites)
        self.seen, self.other = (0, 1) if both else (None, None)
        self.x_max = {half: largest_inputs(group, half) for half in {None, self.seen}}
        self._known: dict[fx.Node, tuple[list[Tensor], float]] = {}

    def scale(self, alpha: float | None, half: int | None = None) -> Tensor:
        """float32 [channels], from all data or one half of it; ones for None."""
        return torch.ones_like(self.w_max) if alpha is None else smooth_scale(self.x_max[half], self.w_max, alpha)

    def __call__(self, alpha: float | None) -> float:
        """The error, from those of the layers as `shared_criterion` says."""
        scale = self.scale(alpha, self.seen)
        errors = []
        for site in self.group.sites:
            inputs: dict[Any, list[tuple[Tensor, Tensor]]] = {}
            for layer in site.layers:
                form, weight = site.formats[layer], weight_of(self.gm, layer).float()
                key = (str(form.activation), form.estimator)
                if key not in inputs:
                    kept = site.stats.kept(self.other)
                    inputs[key] = [rounded_input(x, scale, site, form, self.seen) for x in kept]
                wide = weight * scale[weight_index(layer, len(scale))]
                codes = rounded_weight(wide, form)
                shift = _mean_shift(layer, codes - wide, [x for x, _ in inputs[key]]) if _corrected(form) else 0.0
                outputs, power = self._float(site, layer, weight)
                error = 0.0
                for (_, x), y in zip(inputs[key], outputs, strict=True):
                    error += float((run_layer(layer, x, codes) - shift).sub_(y).square().sum())
                errors.append(error / power if power > 0 else 0.0)
        return combined(errors, self.group.sites[0].how.shared_criterion)

    def forget(self) -> None:
        """Drop what is kept to answer faster."""
        self._known.clear()

    def _float(self, site: Site, layer: fx.Node, weight: Tensor) -> tuple[list[Tensor], float]:
        """What a layer gives in float for what is kept, and the sum of squares."""
        if layer not in self._known:
            outputs = [run_layer(layer, x, weight) for x in site.stats.kept(self.other)]
            self._known[layer] = outputs, sum(float(y.square().sum()) for y in outputs)
        return self._known[layer]


def run_layer(layer: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer gives for `x`, without its bias."""
    call: Any = layer.target
    return call(x, weight, None, *layer.args[3:], **{k: v for k, v in layer.kwargs.items() if k != "bias"})


def rounded_input(
    x: Tensor, scale: Tensor, site: Site, form: Format, share: int | Without | None = None
) -> tuple[Tensor, Tensor]:
    """(x / scale, the same rounded as the layer will read it). Ranges are those of all data, or of a share of it."""
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
        low, high = (t.cpu() / scale for t in site.stats.ranges(share))
        s, zero = (t.view([1] * rank) for t in affine_qparams(low.amin(), high.amax(), spec.qtype, spec.scheme))
        block = [-1] * rank
    else:
        s, zero = make_estimator(form.estimator).estimate(_scaled(site, shape, scale, share), spec)
    return x, fake_quantize(x, s, zero if needs_zero_point(spec, zero) else None, block, spec.qtype)


def _scaled(site: Site, shape: list[int], scale: Tensor, share: int | Without | None) -> Tensor:
    """All that is kept of a half (else of all data), scaled: one tensor."""
    half = None if isinstance(share, Without) else share
    kept = [k / scale.view(shape) for k in site.stats.kept(half)]
    return kept[0] if len(kept) == 1 else torch.cat([k.flatten() for k in kept]).view(-1, *[1] * (len(shape) - 1))


def run_rounded(
    layer: fx.Node,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    site: Site,
    scale: Tensor,
    share: int | Without | None = None,
    known: dict[fx.Node, Tensor] | None = None,
) -> Any:
    """What a layer gives for these arguments with its input and its weight scaled and rounded.

    Args:
        share: Of the calibration data that static ranges come from; None: all.
        known: Rounded weights, kept from call to call; None: they are rounded once more.
    """
    form, x, weight = site.formats[layer], args[0], args[1]
    if known is None or layer not in known:
        rounded = rounded_weight(weight.float() * scale[weight_index(layer, len(scale))], form).to(weight.dtype)
        if known is not None:
            known[layer] = rounded
    else:
        rounded = known[layer]
    x = rounded_input(x.float(), scale, site, form, share)[1].to(x.dtype)
    return layer.target(x, rounded, *args[2:], **kwargs)  # type: ignore[operator]


def rounded_weight(weight: Tensor, form: Format) -> Tensor:
    """The weight as it will be; one that is rounded against inputs is rounded to the nearest here."""
    annotation = dict(form.weight)
    if needs_inputs(annotation["algorithm"]):
        annotation["algorithm"] = "rtn"
    algorithm, spec = make_algorithm(annotation["algorithm"]), QSpec.from_json(annotation["spec"])
    if not isinstance(algorithm, RangeEstimator):
        return codes_of_weight(weight, annotation).values()
    scale, zero = algorithm.estimate(weight, spec)
    zero_point = zero if needs_zero_point(spec, zero) else None
    return fake_quantize(weight, scale, zero_point, spec.block(weight.ndim), spec.qtype)


def _corrected(form: Format) -> bool:
    return bool(form.weight.get("correct_bias"))


def _mean_shift(layer: fx.Node, error: Tensor, inputs: list[Tensor]) -> Tensor:
    """What the bias of a layer takes back: the mean of what the weight's error gives, of each output channel."""
    if error.ndim == 2:
        return torch.cat(inputs).mean(0) @ error.T
    outputs = [run_layer(layer, x, error) for x in inputs]
    total = torch.stack([y.mean([0, *range(2, y.ndim)]) for y in outputs]).mean(0)
    return total.view(1, -1, *[1] * (outputs[0].ndim - 2))
