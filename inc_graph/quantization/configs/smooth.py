"""SmoothQuant: outliers of activations move into the weights before both are quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from inc_graph.errors import ConfigError
from inc_graph.quantization.base_config import register_config
from inc_graph.quantization.configs.activations import EXCLUDED, INT8, Int8Config, static_int8
from inc_graph.quantization.fields import Field, a_bool, a_choice, a_number, an_int, either, options_of
from inc_graph.recipe import OpQuant, Recipe
from inc_graph.smoothing import SAMPLES, Smoothing

__all__ = ["SmoothQuantConfig"]

_ALPHA = {
    "init_alpha": Field(0.5, a_number(0, 1), "First alpha of the search."),
    "alpha_min": Field(0.0, a_number(0, 1), "Least alpha of the search."),
    "alpha_max": Field(1.0, a_number(0, 1), "Greatest alpha of the search."),
    "alpha_step": Field(0.1, a_number(0.001, 1), "Step of the search."),
    "shared_criterion": Field("max", a_choice("max", "min", "mean"), "Alpha of layers with one input."),
    "do_blockwise": Field(False, a_bool, "Search by the error of blocks, not of layers."),
}
_SEARCH = {**_ALPHA, "n_samples": Field(SAMPLES, an_int(1), "Entries of calibration data that the search looks at.")}


@register_config(algo_name="smooth_quant")
class SmoothQuantConfig(Int8Config):
    """SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): outliers move from activations into weights; static INT8."""

    fields: ClassVar[dict[str, Field]] = {
        **INT8,
        "excluded_precisions": EXCLUDED,
        "alpha": Field(0.5, either(a_number(0, 1), a_choice("auto")), 'How much of an outlier moves, or "auto".'),
        "folding": Field(False, a_bool, "Only scale where a producer can absorb it; False: multiply elsewhere."),
        "scale_sharing": Field(False, a_bool, "Layers with one input share a scale."),
        **_ALPHA,
        "auto_alpha_args": Field(None, either(a_choice(None), options_of(_SEARCH)),
                                 "The options of the search together; None: those above."),
    }  # fmt: skip
    yields = True  # what another config of a composition claims is that one's to quantize, and smoothed all the same
    auto_alpha_args: Any
    tuning: ClassVar[dict[str, list[Any]]] = {
        "alpha": [round(0.1 * i, 1) for i in range(1, 10)],
        "folding": [True, False],
        "scale_sharing": [True, False],
        "excluded_precisions": [["bf16"]],
    }

    def __setattr__(self, key: str, value: Any) -> None:
        before, together = vars(self).get(key), vars(self).get("auto_alpha_args")
        super().__setattr__(key, value)
        if key in _ALPHA and together and key in together and together[key] == before:  # not said otherwise there
            self.auto_alpha_args = {**together, key: getattr(self, key)}

    def _settle(self) -> None:
        if self.auto_alpha_args is None:
            self.auto_alpha_args = {name: getattr(self, name) for name in _ALPHA}
        self._refuse_no_range()

    def _refuse_no_range(self) -> None:
        """There must be an alpha to search for, whatever is chosen of candidates; also if none is searched for now."""
        for args in self.auto_alpha_args if isinstance(self.auto_alpha_args, list) else [self.auto_alpha_args]:
            search = {name: getattr(self, name) for name in _ALPHA} | (args or {})
            ends = [v if isinstance(v, list) else [v] for v in (search["alpha_min"], search["alpha_max"])]
            if (low := max(ends[0])) > (high := min(ends[1])):
                names = [
                    n if search[n] == getattr(self, n) else f"auto_alpha_args[{n!r}]"
                    for n in ("alpha_min", "alpha_max")
                ]
                message = f"SmoothQuantConfig.{names[0]} {low} is above {names[1]} {high}"
                raise ConfigError(message, hint="the search for alpha goes from alpha_min to alpha_max")

    def _smoothing(self) -> Smoothing:
        """What the fields say of smoothing; `auto_alpha_args` counts more than the fields of the same names."""
        self._refuse_no_range()  # fields may have been set since
        search = {**{name: getattr(self, name) for name in _ALPHA}, **self.auto_alpha_args}
        return Smoothing(self.alpha, self.folding, self.scale_sharing, **search)

    def op_quant(self) -> OpQuant | None:
        if self.leaves_float():
            return None
        return replace(static_int8(self, bias_correction=True), smooth=str(self._smoothing()))

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        return Recipe(
            self.name,
            self.rules(),
            prepare="fold-constants,canonicalize,fold-conv-bn,annotate,insert-observers,watch-channels",
            convert="smooth-quant,correct-bias,convert-qdq",
            supported=supported,
            backend=backend,
        )
