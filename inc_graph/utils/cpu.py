"""The processor: read from the system when it is asked for, once."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

__all__ = ["CpuInfo", "cpu_info"]


class CpuInfo:
    """What the processor can do. Where the system does not tell, what it might have too is said not to be there."""

    @functools.cached_property
    def _entries(self) -> list[dict[str, str]]:
        """An entry a logical processor; of Linux alone."""
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return [dict(re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", part, re.MULTILINE)) for part in text.split("\n\n")]

    @functools.cached_property
    def _flags(self) -> set[str]:
        entry = self._entries[0] if self._entries else {}
        return set((entry.get("flags") or entry.get("Features") or "").split())

    @property
    def bf16(self) -> bool:
        """Whether it multiplies bfloat16."""
        return bool(self._flags & {"avx512_bf16", "amx_bf16", "bf16"})

    @property
    def fp16(self) -> bool:
        """Whether it multiplies float16."""
        return bool(self._flags & {"avx512_fp16", "amx_fp16", "asimdhp"})

    @property
    def vnni(self) -> bool:
        """Whether it multiplies int8 and sums up in one instruction."""
        return bool(self._flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})

    @property
    def brand_raw(self) -> str:
        """What its maker calls it."""
        return next((e["model name"] for e in self._entries if "model name" in e), platform.processor())

    @property
    def sockets(self) -> int:
        """Processors in the machine."""
        return len({e["physical id"] for e in self._entries if "physical id" in e}) or 1

    @property
    def cores(self) -> int:
        """Physical cores of all sockets; logical ones where the system does not tell."""
        found = {(e["physical id"], e["core id"]) for e in self._entries if "physical id" in e and "core id" in e}
        return len(found) or os.cpu_count() or 1

    @property
    def cores_per_socket(self) -> int:
        """Physical cores of one socket."""
        return self.cores // self.sockets


cpu_info = CpuInfo()
