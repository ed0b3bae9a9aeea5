"""All configs, and functions that give the usual ones."""

from __future__ import annotations

from typing import Any

from inc_graph.errors import UnknownNameError
from inc_graph.quantization.base_config import DEFAULT_WHITE_LIST, BaseConfig, OperatorConfig, register_config
from inc_graph.quantization.composable import ComposableConfig
from inc_graph.quantization.configs.activations import INT8StaticQuantConfig, StaticQuantConfig
from inc_graph.quantization.configs.dynamic import DynamicQuantConfig
from inc_graph.quantization.configs.floats import FP8Config, HybridGPTQConfig, MXQuantConfig
from inc_graph.quantization.configs.mixed import MixedPrecisionConfig
from inc_graph.quantization.configs.smooth import SmoothQuantConfig
from inc_graph.quantization.configs.weight_only import (
    LM_HEAD_NAMES,
    AutoRoundConfig,
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
)
from inc_graph.registry import CONFIGS
from inc_graph.utils.processor import get_processor_type_from_user_config

__all__ = [
    "DEFAULT_WHITE_LIST", "DOUBLE_QUANT_CONFIGS", "LM_HEAD_NAMES", "AWQConfig", "AutoRoundConfig", "BaseConfig",
    "ComposableConfig", "DynamicQuantConfig", "FP8Config", "GPTQConfig", "HQQConfig", "HybridGPTQConfig",
    "INT8StaticQuantConfig", "MXQuantConfig", "MixedPrecisionConfig", "OperatorConfig", "RTNConfig",
    "SmoothQuantConfig", "StaticQuantConfig", "TEQConfig", "get_all_config_set", "get_all_registered_configs",
    "get_default_AutoRound_config", "get_default_awq_config", "get_default_double_quant_config",
    "get_default_dynamic_config", "get_default_fp8_config", "get_default_fp8_config_set", "get_default_gptq_config",
    "get_default_hqq_config", "get_default_mixed_precision_config", "get_default_mixed_precision_config_set",
    "get_default_mx_config", "get_default_rtn_config", "get_default_sq_config", "get_default_static_config",
    "get_default_teq_config", "get_rtn_double_quant_config_set", "get_woq_tuning_config", "register_config",
]  # fmt: skip

DOUBLE_QUANT_CONFIGS: dict[str, dict[str, Any]] = {
    "BNB_NF4": {
        "dtype": "nf4", "bits": 4, "group_size": 32, "use_double_quant": True, "double_quant_bits": 8,
        "double_quant_dtype": "int", "double_quant_use_sym": False, "double_quant_group_size": 256,
    },
    "GGML_TYPE_Q4_K": {
        "dtype": "int", "bits": 4, "use_sym": False, "group_size": 32, "use_double_quant": True,
        "double_quant_bits": 6, "double_quant_dtype": "int", "double_quant_use_sym": True, "double_quant_group_size": 8,
    },
}  # fmt: skip
"""Presets of RTN with quantized scales: that of bitsandbytes' NF4 (QLoRA), and that of llama.cpp's Q4_K."""


def get_default_rtn_config(processor_type: Any = None) -> RTNConfig:
    """RTN for a "client" or "server"; None: what this machine is."""
    return RTNConfig.get_predefined_configs()[get_processor_type_from_user_config(processor_type)]


def get_default_gptq_config(processor_type: Any = None) -> GPTQConfig:
    """GPTQ for a "client" or "server"; None: what this machine is."""
    return GPTQConfig.get_predefined_configs()[get_processor_type_from_user_config(processor_type)]


def get_default_AutoRound_config(processor_type: Any = None) -> AutoRoundConfig:
    """AutoRound for a "client" or "server"; None: what this machine is."""
    return AutoRoundConfig.get_predefined_configs()[get_processor_type_from_user_config(processor_type)]


def get_default_double_quant_config(type: str = "BNB_NF4") -> RTNConfig:
    """RTN with quantized scales, a preset of `DOUBLE_QUANT_CONFIGS`.

    Raises:
        UnknownNameError: there is no such preset.
    """
    if type not in DOUBLE_QUANT_CONFIGS:
        raise UnknownNameError(
            f"no preset {type!r} of double quantization", hint=f"one of {', '.join(DOUBLE_QUANT_CONFIGS)}"
        )
    return RTNConfig.from_dict(DOUBLE_QUANT_CONFIGS[type])


def get_rtn_double_quant_config_set() -> list[RTNConfig]:
    """The presets of double quantization."""
    return [get_default_double_quant_config(name) for name in DOUBLE_QUANT_CONFIGS]


def get_default_awq_config() -> AWQConfig:
    """The default AWQ config."""
    return AWQConfig()


def get_default_teq_config() -> TEQConfig:
    """The default TEQ config."""
    return TEQConfig()


def get_default_hqq_config() -> HQQConfig:
    """The default HQQ config."""
    return HQQConfig()


def get_default_static_config() -> INT8StaticQuantConfig:
    """The default static INT8 config."""
    return INT8StaticQuantConfig()


def get_default_dynamic_config() -> DynamicQuantConfig:
    """The default dynamic INT8 config."""
    return DynamicQuantConfig()


def get_default_sq_config() -> SmoothQuantConfig:
    """The default SmoothQuant config."""
    return SmoothQuantConfig()


def get_default_mx_config() -> MXQuantConfig:
    """The default MX config."""
    return MXQuantConfig()


def get_default_fp8_config() -> FP8Config:
    """The default FP8 config."""
    return FP8Config()


def get_default_fp8_config_set() -> FP8Config:
    """The FP8 config to tune with."""
    return FP8Config.get_config_set_for_tuning()


def get_default_mixed_precision_config() -> MixedPrecisionConfig:
    """The default mixed precision config."""
    return MixedPrecisionConfig()


def get_default_mixed_precision_config_set() -> MixedPrecisionConfig:
    """The mixed precision config to tune with: all its formats."""
    return MixedPrecisionConfig.get_config_set_for_tuning()


def get_woq_tuning_config() -> list[BaseConfig]:
    """Weight-only configs to tune with, asymmetric in groups of 32: RTN, AutoRound, GPTQ, AWQ."""
    shared: dict[str, Any] = {"use_sym": False, "group_size": 32}
    return [RTNConfig(**shared), AutoRoundConfig(**shared, seqlen=512), GPTQConfig(**shared), AWQConfig(**shared)]


_ORDER = ("rtn", "gptq", "awq", "teq", "autoround", "mx_quant", "pt2e_dynamic_quant", "static_quant", "smooth_quant",
          "hqq", "fp8_quant", "hybrid_gptq", "mixed_precision")  # fmt: skip


def get_all_registered_configs() -> dict[str, type[BaseConfig]]:
    """Algorithm -> config class; those of extensions behind ours."""
    known = dict(CONFIGS.items())
    return {name: known[name] for name in (*_ORDER, *sorted(set(known) - set(_ORDER)))}


def get_all_config_set() -> list[BaseConfig]:
    """One config with candidates for each algorithm, to tune with."""
    return [kind.get_config_set_for_tuning() for kind in get_all_registered_configs().values()]
