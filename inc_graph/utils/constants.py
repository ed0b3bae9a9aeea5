"""Names and numbers that scripts for neural_compressor know."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from inc_graph.errors import ConfigError

__all__ = [
    "HPU_SAFE_WEIGHTS_NAME", "HPU_WEIGHT_NAME", "OP_NAME_AND_TYPE_TUPLE_TYPE", "PRIORITY_AUTOROUND", "PRIORITY_AWQ",
    "PRIORITY_GPTQ", "PRIORITY_HQQ", "PRIORITY_RTN", "PRIORITY_TEQ", "PT2E_DYNAMIC_QUANT", "PT2E_STATIC_QUANT",
    "QCONFIG_NAME", "SHARDED_HPU_WEIGHT_NAME", "SHARDED_WEIGHT_NAME", "UNIT_MAPPING", "WEIGHT_NAME", "SaveLoadFormat",
    "get_enum_from_format",
]  # fmt: skip

OP_NAME_AND_TYPE_TUPLE_TYPE: TypeAlias = tuple[str, nn.Module | Callable[..., Any]]

UNIT_MAPPING = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40, "B": 1}

# where two methods claim a layer, the one with the higher priority gets it; of the config classes the same
PRIORITY_GPTQ = 90
PRIORITY_RTN = 80
PRIORITY_HQQ = 75
PRIORITY_AWQ = 70
PRIORITY_TEQ = 60
PRIORITY_AUTOROUND = 50

PT2E_STATIC_QUANT = "pt2e_static_quant"
PT2E_DYNAMIC_QUANT = "pt2e_dynamic_quant"

# files of neural_compressor's own layouts, for programs that look for them
QCONFIG_NAME = "qconfig.json"
WEIGHT_NAME = "quantized_weight.pt"
SHARDED_WEIGHT_NAME = "model_bin_index.json"
HPU_WEIGHT_NAME = "quantized_hpu_weight.pt"
SHARDED_HPU_WEIGHT_NAME = "quantized_hpu_weight.safetensors"
HPU_SAFE_WEIGHTS_NAME = "hpu_model.safetensors"


class SaveLoadFormat(enum.Enum):
    """Layouts that `save` and `load` are asked for."""

    DEFAULT = "default"
    HUGGINGFACE = "huggingface"
    VLLM = "vllm"


def get_enum_from_format(format: Any) -> SaveLoadFormat:
    """The member of `SaveLoadFormat` for "default", or for itself. ConfigError for another value."""
    for member in SaveLoadFormat:
        if format is member or (isinstance(format, str) and format.lower() == member.value):
            return member
    known = ", ".join(repr(m.value) for m in SaveLoadFormat)
    raise ConfigError(f"format must be one of {known}, not {format!r}")
