"""Quantize a model: `prepare`, run calibration data, `convert`."""

from inc_graph.quantization.api import convert, finalize_calibration, prepare, quantize
from inc_graph.quantization.config import INT8StaticQuantConfig, StaticQuantConfig, get_default_static_config
from inc_graph.quantization.model import QuantizedModel

__all__ = [
    "INT8StaticQuantConfig",
    "QuantizedModel",
    "StaticQuantConfig",
    "convert",
    "finalize_calibration",
    "get_default_static_config",
    "prepare",
    "quantize",
]
