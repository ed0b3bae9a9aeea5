"""What is installed, what is imported, how much memory is used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

from inc_graph.utils.version import Version

__all__ = [
    "can_pack_with_numba", "get_ipex_version", "get_used_cpu_mem_MB", "get_used_hpu_mem_MB", "is_hpex_available",
    "is_hpex_support_g_idx", "is_hpu_available", "is_ipex_available", "is_numba_available", "is_optimum_available",
    "is_optimum_habana_available", "is_package_available", "is_tbb_available", "is_transformers_imported",
]  # fmt: skip

_MB = 1024 * 1024


def is_package_available(package_name: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    try:
        return package_name in sys.modules or importlib.util.find_spec(package_name) is not None
    except (ImportError, ValueError):  # a package above it is missing
        return False


def is_ipex_available() -> bool:
    """Whether intel_extension_for_pytorch is installed."""
    return is_package_available("intel_extension_for_pytorch")


def is_hpex_available() -> bool:
    """Whether Gaudi's habana_frameworks.torch is installed."""
    return is_package_available("habana_frameworks.torch")


def is_hpu_available() -> bool:
    """Whether a Gaudi accelerator can be used."""
    return is_hpex_available() and _hpu() is not None and bool(_hpu().is_available())


def is_hpex_support_g_idx() -> bool:
    """Whether Gaudi's operator that unpacks 4-bit weights takes the group of each row."""
    if not is_hpex_available():
        return False
    importlib.import_module("habana_frameworks.torch")  # it registers the operator
    try:
        return "group_index" in str(torch._C._get_schema("hpu::convert_from_int4", ""))
    except RuntimeError:  # there is no such operator
        return False


def _hpu() -> Any:
    return getattr(torch, "hpu", None)  # there once habana_frameworks.torch is imported


def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return is_package_available("optimum")


def is_optimum_habana_available() -> bool:
    """Whether optimum-habana is installed."""
    return is_package_available("optimum.habana")


def is_numba_available() -> bool:
    """Whether numba is installed."""
    return is_package_available("numba")


def is_tbb_available() -> bool:
    """Whether tbb, threads for numba, is installed."""
    try:
        importlib.metadata.version("tbb")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def can_pack_with_numba() -> bool:
    """Whether numba and tbb are there, with which neural_compressor packs weights. Here torch packs them."""
    return is_numba_available() and is_tbb_available()


def is_transformers_imported() -> bool:
    """Whether the program has imported transformers."""
    return "transformers" in sys.modules


def get_ipex_version() -> Version | None:
    """The version of intel_extension_for_pytorch, None if it is not installed."""
    try:
        version = importlib.metadata.version("intel_extension_for_pytorch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Version(version.partition("+")[0])


def get_used_cpu_mem_MB() -> float:
    """Resident memory of this process in MiB; where the system does not tell (no /proc), the most it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MB if sys.platform == "darwin" else peak / 1024


def get_used_hpu_mem_MB() -> float:
    """Memory of the Gaudi accelerator that this process has allocated, in MiB; 0 without one."""
    return float(_hpu().memory_allocated()) / _MB if is_hpu_available() else 0.0
