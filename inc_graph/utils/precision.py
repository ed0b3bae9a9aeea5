"""Which half-precision formats the machine has instructions for.

neural_compressor asks for `avx512_bf16` or `avx512_fp16` (or their AMX tiles), and takes FORCE_BF16=1 and FORCE_FP16=1
for a yes; so does this.
"""

from __future__ import annotations

import os

from inc_graph.fast import fast_dtype
from inc_graph.recipe import HALF_DTYPES
from inc_graph.utils.cpu import cpu_info

__all__ = ["forced", "why_slow"]

_NEEDS = {
    "bf16": "avx512_bf16, amx_bf16 or an Arm CPU with bf16",
    "fp16": "avx512_fp16, amx_fp16 or an Arm CPU with fp16",
}


def forced(name: str) -> bool:
    """Whether the user asks for "bf16" or "fp16" whatever the machine can do: FORCE_BF16=1, FORCE_FP16=1."""
    return os.environ.get(f"FORCE_{name.upper()}", "") == "1"


def why_slow(name: str, device: str = "cpu") -> str | None:
    """Why "bf16" or "fp16" gains nothing on a device of this kind, None if it does. Accelerators have both."""
    if device.partition(":")[0] not in ("cpu", "meta"):
        return None
    if name == "bf16" and (cpu_info.bf16 or fast_dtype() == HALF_DTYPES[name]):
        return None
    if name == "fp16" and cpu_info.fp16:
        return None
    return f"this CPU has no instructions for {name} (it takes {_NEEDS[name]})"
