"""Devices, modules and blocks by name, what is installed, files, constants: what scripts use around quantization.

What depends on the machine, or would have to load more, is looked up when it is asked for: `accelerator`, `local_rank`,
`world_size`, and the presets of double quantization.
"""

import importlib
from typing import Any

from inc_graph.algorithms import (
    algos_mapping,
    get_quantizer,
    postprocess_model,
    register_algo,
)
from inc_graph.common.logger import logger
from inc_graph.common.mode import Mode
from inc_graph.utils.accelerators import (
    Accelerator,
    device_synchronize,
    get_accelerator,
    get_local_rank,
    get_world_size,
)
from inc_graph.utils.block_names import (
    find_matching_blocks,
    get_block_names,
    get_layer_names_in_block,
    get_multimodal_block_names,
    validate_modules,
)
from inc_graph.utils.constants import (
    HPU_SAFE_WEIGHTS_NAME,
    HPU_WEIGHT_NAME,
    OP_NAME_AND_TYPE_TUPLE_TYPE,
    PRIORITY_AUTOROUND,
    PRIORITY_AWQ,
    PRIORITY_GPTQ,
    PRIORITY_HQQ,
    PRIORITY_RTN,
    PRIORITY_TEQ,
    PT2E_DYNAMIC_QUANT,
    PT2E_STATIC_QUANT,
    QCONFIG_NAME,
    SHARDED_HPU_WEIGHT_NAME,
    SHARDED_WEIGHT_NAME,
    UNIT_MAPPING,
    WEIGHT_NAME,
    SaveLoadFormat,
    get_enum_from_format,
)
from inc_graph.utils.cpu import (
    CpuInfo,
    cpu_info,
)
from inc_graph.utils.device import (
    choose_backend,
    detect_device,
    is_ipex_imported,
)
from inc_graph.utils.environment import (
    can_pack_with_numba,
    get_ipex_version,
    get_used_cpu_mem_MB,
    get_used_hpu_mem_MB,
    is_hpex_available,
    is_hpex_support_g_idx,
    is_hpu_available,
    is_ipex_available,
    is_numba_available,
    is_optimum_available,
    is_optimum_habana_available,
    is_package_available,
    is_tbb_available,
    is_transformers_imported,
)
from inc_graph.utils.files import (
    read_json_file,
    write_json_file,
)
from inc_graph.utils.huggingface import (
    dowload_hf_model,
    load_empty_model,
)
from inc_graph.utils.modules import (
    SUPPORTED_LAYERS,
    WHITE_MODULE_LIST,
    fetch_module,
    forward_wrapper,
    get_attr,
    get_model_device,
    get_model_info,
    get_module,
    get_non_persistent_buffers,
    load_non_persistent_buffers,
    move_input_device,
    set_attr,
    set_module,
    to_device,
    to_dtype,
)
from inc_graph.utils.processor import (
    ProcessorType,
    detect_processor_type_based_on_hw,
    get_processor_type_from_user_config,
)
from inc_graph.utils.progress import progress
from inc_graph.utils.statistics import (
    Statistics,
    dump_model_op_stats,
)
from inc_graph.utils.version import (
    GT_OR_EQUAL_TORCH_VERSION_2_5,
    TORCH_VERSION_2_2_2,
    TORCH_VERSION_2_7_0,
    TORCH_VERSION_2_8_0,
    TORCH_VERSION_2_11_0,
    Version,
    get_torch_version,
)

__all__ = [
    "DOUBLE_QUANT_CONFIGS",
    "GT_OR_EQUAL_TORCH_VERSION_2_5",
    "HPU_SAFE_WEIGHTS_NAME",
    "HPU_WEIGHT_NAME",
    "LM_HEAD_NAMES",
    "OP_NAME_AND_TYPE_TUPLE_TYPE",
    "PRIORITY_AUTOROUND",
    "PRIORITY_AWQ",
    "PRIORITY_GPTQ",
    "PRIORITY_HQQ",
    "PRIORITY_RTN",
    "PRIORITY_TEQ",
    "PT2E_DYNAMIC_QUANT",
    "PT2E_STATIC_QUANT",
    "QCONFIG_NAME",
    "SHARDED_HPU_WEIGHT_NAME",
    "SHARDED_WEIGHT_NAME",
    "SUPPORTED_LAYERS",
    "TORCH_VERSION_2_2_2",
    "TORCH_VERSION_2_7_0",
    "TORCH_VERSION_2_8_0",
    "TORCH_VERSION_2_11_0",
    "UNIT_MAPPING",
    "WEIGHT_NAME",
    "WHITE_MODULE_LIST",
    "Accelerator",
    "CpuInfo",
    "Mode",
    "ProcessorType",
    "SaveLoadFormat",
    "Statistics",
    "Version",
    "accelerator",
    "algos_mapping",
    "can_pack_with_numba",
    "choose_backend",
    "cpu_info",
    "detect_device",
    "detect_processor_type_based_on_hw",
    "device_synchronize",
    "dowload_hf_model",
    "dump_model_op_stats",
    "fetch_module",
    "find_matching_blocks",
    "forward_wrapper",
    "get_accelerator",
    "get_attr",
    "get_block_names",
    "get_double_quant_config_dict",
    "get_enum_from_format",
    "get_ipex_version",
    "get_layer_names_in_block",
    "get_model_device",
    "get_model_info",
    "get_module",
    "get_multimodal_block_names",
    "get_non_persistent_buffers",
    "get_processor_type_from_user_config",
    "get_quantizer",
    "get_torch_version",
    "get_used_cpu_mem_MB",
    "get_used_hpu_mem_MB",
    "is_hpex_available",
    "is_hpex_support_g_idx",
    "is_hpu_available",
    "is_ipex_available",
    "is_ipex_imported",
    "is_numba_available",
    "is_optimum_available",
    "is_optimum_habana_available",
    "is_package_available",
    "is_tbb_available",
    "is_transformers_imported",
    "load_empty_model",
    "load_non_persistent_buffers",
    "local_rank",
    "logger",
    "move_input_device",
    "postprocess_model",
    "progress",
    "read_json_file",
    "register_algo",
    "set_attr",
    "set_module",
    "to_device",
    "to_dtype",
    "validate_modules",
    "world_size",
    "write_json_file",
]

_FROM_CONFIG = ("DOUBLE_QUANT_CONFIGS", "LM_HEAD_NAMES", "get_double_quant_config_dict")
_OF_PYTHON = {  # names that scripts import from here because they happen to be visible in neural_compressor
    **dict.fromkeys(("Callable", "Dict", "List", "Optional", "Tuple", "TypeAlias", "Union"), "typing"),
    "Enum": "enum", "UserDict": "collections", "lru_cache": "functools",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _FROM_CONFIG:  # the configs use this package themselves
        return getattr(importlib.import_module("inc_graph.utils.presets"), name)
    if name in _OF_PYTHON:
        return getattr(importlib.import_module(_OF_PYTHON[name]), name)
    if name == "accelerator":
        return get_accelerator()
    if name == "world_size":
        return get_world_size()
    if name == "local_rank":
        return get_local_rank()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
