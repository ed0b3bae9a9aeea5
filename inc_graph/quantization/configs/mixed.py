"""Mixed precision: half precision where it serves, float32 elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from inc_graph.quantization.base_config import BaseConfig, register_config
from inc_graph.quantization.fields import Field, a_choice

__all__ = ["MixedPrecisionConfig"]


@register_config(algo_name="mixed_precision")
class MixedPrecisionConfig(BaseConfig):
    """Half precision for what stands it, float32 for the rest."""

    fields: ClassVar[dict[str, Field]] = {
        "dtype": Field("fp16", a_choice("fp16", "bf16", "fp32"), "Format; fp32 leaves float."),
    }
    operators: ClassVar[tuple[Any, ...]] = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    needs_calibration = False
    tuning: ClassVar[dict[str, list[Any]]] = {"dtype": ["fp16", "bf16", "fp32"]}

    def leaves_float(self) -> bool:
        return self.dtype == "fp32"
