"""What the backends for x86 CPUs share: int8 layers, weight-only layers in any format, and where they run."""

from __future__ import annotations

import platform

import torch

from inc_graph.lowering._context import CODES, WEIGHTS
from inc_graph.lowering._weight_only_claims import FORMATS
from inc_graph.lowering.base import Backend

__all__ = ["X86Backend", "capabilities"]

_Table = dict[str, tuple[tuple[str | None, str | None], ...]]


def capabilities(layers: tuple[str, ...], plain: tuple[str, ...] = (), weight_only: tuple[str, ...] = ()) -> _Table:
    """A capability table: `layers` and linear with int8 on both sides, sums of int8, and formats of weights alone.

    `plain`: what takes int8 activations and has no weight, beside sums. `weight_only`: what takes quantized weights
    beside linear layers and tables.
    """
    int8 = tuple((a, w) for a in CODES for w in WEIGHTS)
    weights = tuple((None, w) for w in FORMATS)
    return {
        "linear": int8 + weights,
        **dict.fromkeys(layers, int8),
        **dict.fromkeys(("add", *plain), tuple((a, None) for a in CODES)),
        **dict.fromkeys((*weight_only, "embedding"), weights),
    }


class X86Backend(Backend):
    """A backend whose kernels are written for x86."""

    compute_dtype: torch.dtype | None = None
    """What weight-only layers are computed in; None: `INC_COMPUTE_DTYPE`, else what is fastest here."""

    def available(self) -> str | None:
        machine = platform.machine()
        if machine.lower() not in ("x86_64", "amd64"):
            return f"the kernels of backend {self.name!r} need an x86 CPU, this is {machine}"
        return self.lacks()

    def lacks(self) -> str | None:
        """What is missing on an x86 CPU for this backend to run, None if nothing is."""
        return None
