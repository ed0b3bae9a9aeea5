"""Mixed precision: half precision where it serves, float32 elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from inc_graph.quantization.base_config import BaseConfig, register_config
from inc_graph.quantization.fields import Field, a_choice
from inc_graph.recipe import HALF_DTYPES, OpQuant, Recipe

__all__ = ["MixedPrecisionConfig"]


@register_config(algo_name="mixed_precision")
class MixedPrecisionConfig(BaseConfig):
    """Half precision for what stands it, float32 for the rest. It needs no calibration.

    Layers (linear, convolution, products, attention) and tables compute and are stored in half precision; norms,
    softmax, sums, exponentials and the like stay float32; what is between them goes where that saves casts. Inputs and
    outputs of the model keep their dtypes. With `+` after a config that quantizes it is for what that leaves float.

    Where the machine has no instructions for a format, float32 is used instead, and a `PrecisionWarning` says so; the
    environment variable FORCE_BF16=1 or FORCE_FP16=1 converts all the same.

    Fields:
        dtype: "fp16", "bf16", or "fp32", which leaves float.
    """

    dtype: str

    fields: ClassVar[dict[str, Field]] = {
        "dtype": Field("fp16", a_choice("fp16", "bf16", "fp32"), "Format; fp32 leaves float."),
    }
    operators: ClassVar[tuple[Any, ...]] = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    needs_calibration = False
    tuning: ClassVar[dict[str, list[Any]]] = {"dtype": ["fp16", "bf16", "fp32"]}

    def leaves_float(self) -> bool:
        return self.dtype == "fp32"

    @property
    def half(self) -> torch.dtype | None:
        return HALF_DTYPES.get(self.dtype)

    def op_quant(self) -> OpQuant | None:
        return None if self.leaves_float() else OpQuant(half=self.dtype)

    def recipe(self, backend: str, supported: tuple[str, ...] | None) -> Recipe:
        return Recipe(
            self.name,
            self.rules(),
            prepare="fold-constants,canonicalize,fold-conv-bn,annotate,insert-observers",
            convert="convert-qdq,mixed-precision",
            supported=supported,
            backend=backend,
        )
