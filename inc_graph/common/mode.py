"""The phases of a method, as `algos_mapping` entries are told them."""

from __future__ import annotations

import enum

__all__ = ["Mode"]


class Mode(enum.Enum):
    """What the entry of an algorithm is called for."""

    PREPARE = "prepare"
    CONVERT = "convert"
    QUANTIZE = "quantize"
    LOAD = "load"
