"""Client or server: which defaults fit the machine."""

from __future__ import annotations

import enum
import os
from typing import Any

from inc_graph.errors import ConfigError

__all__ = ["ProcessorType", "detect_processor_type_based_on_hw", "get_processor_type_from_user_config"]

_GIB = 1 << 30


class ProcessorType(enum.Enum):
    """Where quantization runs: a client has little memory, so that layers are quantized one at a time."""

    Client = "Client"
    Server = "Server"


def detect_processor_type_based_on_hw() -> ProcessorType:
    """Server for more than 8 physical cores and 32 GiB of memory, else client."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        memory = 0
    return ProcessorType.Server if (os.cpu_count() or 1) > 16 and memory > 32 * _GIB else ProcessorType.Client


def get_processor_type_from_user_config(user_processor_type: Any = None) -> ProcessorType:
    """The type the user named ("client", "Server", a `ProcessorType`), or what the hardware says for None.

    Raises:
        ConfigError: for another name.
    """
    if user_processor_type is None:
        return detect_processor_type_based_on_hw()
    if isinstance(user_processor_type, ProcessorType):
        return user_processor_type
    if isinstance(user_processor_type, str):
        for kind in ProcessorType:
            if kind.value.lower() == user_processor_type.lower():
                return kind
    raise ConfigError(f"processor type must be 'client' or 'server', not {user_processor_type!r}")
