"""Presets of the configs, as dictionaries."""

from __future__ import annotations

import copy
from typing import Any

from inc_graph.errors import UnknownNameError
from inc_graph.quantization.config import DOUBLE_QUANT_CONFIGS, LM_HEAD_NAMES

__all__ = ["DOUBLE_QUANT_CONFIGS", "LM_HEAD_NAMES", "get_double_quant_config_dict"]


def get_double_quant_config_dict(double_quant_type: str = "BNB_NF4") -> dict[str, Any]:
    """The fields of `RTNConfig` of a preset of `DOUBLE_QUANT_CONFIGS`, to be changed as one likes.

    Raises:
        UnknownNameError: there is no such preset.
    """
    if double_quant_type not in DOUBLE_QUANT_CONFIGS:
        hint = f"one of {', '.join(DOUBLE_QUANT_CONFIGS)}"
        raise UnknownNameError(f"no preset {double_quant_type!r} of double quantization", hint=hint)
    return copy.deepcopy(DOUBLE_QUANT_CONFIGS[double_quant_type])
