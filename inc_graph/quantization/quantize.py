"""The entry functions under the name of the module that neural_compressor has them in."""

from __future__ import annotations

from typing import Any

from torch import nn

from inc_graph.quantization.api import convert, finalize_calibration, prepare, quantize
from inc_graph.quantization.tuning import autotune

__all__ = ["autotune", "convert", "finalize_calibration", "prepare", "prepare_qat", "quantize"]


def prepare_qat(model: nn.Module, mapping: Any = None, inplace: bool = True) -> nn.Module:
    """Quantization-aware training, which this version does not have.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("prepare_qat: this version does not have quantization-aware training")
