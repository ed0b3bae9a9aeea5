"""What this processor multiplies fast."""

from __future__ import annotations

import functools
import platform

import torch

__all__ = ["fast_dtype"]


@functools.cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32: what float32 layers are computed in."""
    names = ("avx512_bf16", "amx_tile")  # with AVX-512 alone oneDNN has it too, emulated
    has = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in names)
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() and (has or arm) else torch.float32
