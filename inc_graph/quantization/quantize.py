"""The entry functions under the name of the module that neural_compressor has them in."""

from __future__ import annotations

from inc_graph.quantization.api import convert, finalize_calibration, prepare, quantize
from inc_graph.quantization.qat import freeze_batch_norm, freeze_observers, prepare_qat
from inc_graph.quantization.tuning import autotune

__all__ = [
    "autotune",
    "convert",
    "finalize_calibration",
    "freeze_batch_norm",
    "freeze_observers",
    "prepare",
    "prepare_qat",
    "quantize",
]
