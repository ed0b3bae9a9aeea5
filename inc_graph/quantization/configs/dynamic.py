"""Dynamic INT8: ranges of activations are found as the model runs."""

from __future__ import annotations

from typing import Any, ClassVar

from inc_graph.quantization.base_config import register_config
from inc_graph.quantization.configs.activations import INT8, Int8Config
from inc_graph.quantization.fields import Field, a_choice

__all__ = ["DynamicQuantConfig"]


@register_config(algo_name="pt2e_dynamic_quant")
class DynamicQuantConfig(Int8Config):
    """Dynamic quantization: activation ranges are found at run time, so that no data is needed."""

    fields: ClassVar[dict[str, Field]] = {
        **INT8,
        "w_granularity": Field("per_tensor", INT8["w_granularity"].check, INT8["w_granularity"].doc),
        "act_granularity": Field("per_tensor", a_choice("per_tensor", "per_token"), INT8["act_granularity"].doc),
        "act_algo": Field("kl", INT8["act_algo"].check, "Accepted for compatibility: at run time it is min-max."),
    }
    needs_calibration = False
    tuning: ClassVar[dict[str, list[Any]]] = {"act_sym": [True, False], "act_algo": ["kl", "minmax"]}
