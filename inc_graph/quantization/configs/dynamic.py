"""Dynamic INT8: ranges of activations are found as the model runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from inc_graph.quantization.base_config import register_config
from inc_graph.quantization.configs.activations import INT8, Int8Config, static_int8
from inc_graph.quantization.fields import Field, a_choice
from inc_graph.recipe import OpQuant, Recipe
from inc_graph.spec import PerTensor, PerToken

__all__ = ["DynamicQuantConfig"]


@register_config(algo_name="pt2e_dynamic_quant")
class DynamicQuantConfig(Int8Config):
    """Dynamic quantization: activation ranges are found at run time, so that no data is needed.

    For linear layers, products of two activations (where the backend has a kernel, or by name), LSTM and GRU. The
    defaults are those of Intel Neural Compressor; `act_granularity="per_token", w_granularity="per_channel"` is much
    closer to the float model.

    Fields:
        w_dtype: Weight type: any integer or codebook qtype, such as "int8", "int7", "int4"; "fp32" leaves the operator
            float.
        w_sym: Weights symmetric around zero.
        w_granularity: "per_tensor" or "per_channel" (one scale an output channel).
        w_algo: Range estimator of weights: "minmax", "mse", "percentile{percent=99.99}", ...
        act_dtype: Activation type: any integer qtype, such as "uint8", "int8"; "fp32" quantizes weights only.
        act_sym: Activations symmetric around zero.
        act_granularity: "per_tensor", or "per_token": a scale for each row.
        act_algo: Accepted for compatibility: at run time ranges are those of the smallest and largest value.
    """

    fields: ClassVar[dict[str, Field]] = {
        **INT8,
        "w_granularity": Field("per_tensor", INT8["w_granularity"].check, INT8["w_granularity"].doc),
        "act_granularity": Field("per_tensor", a_choice("per_tensor", "per_token"), INT8["act_granularity"].doc),
        "act_algo": Field("kl", INT8["act_algo"].check, "Accepted for compatibility: at run time it is min-max."),
    }
    operators: ClassVar[tuple[Any, ...]] = (torch.nn.Linear, "Conv1D", torch.nn.LSTM, torch.nn.GRU, torch.matmul)
    scope: ClassVar[str] = "linear,Conv1D,matmul,addmm,baddbmm,lstm,gru"
    needs_calibration = False
    tuning: ClassVar[dict[str, list[Any]]] = {"act_sym": [True, False], "act_algo": ["kl", "minmax"]}

    w_dtype: str
    w_sym: bool
    w_granularity: str
    w_algo: str
    act_dtype: str
    act_sym: bool
    act_granularity: str
    act_algo: str

    def op_quant(self) -> OpQuant | None:
        if self.w_dtype == "fp32":
            return None
        what = static_int8(self, bias_correction=False)
        rows = PerToken() if self.act_granularity == "per_token" else PerTensor()
        activation = what.activation and replace(what.activation, granularity=rows, dynamic=True)
        return replace(what, activation=activation, act_algorithm="minmax")

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        return Recipe(
            self.name,
            self.rules(),
            prepare="fold-constants,canonicalize,split-recurrent,annotate,insert-observers",
            convert="convert-qdq",
            supported=supported,
            backend=backend,
        )
