"""Double quantization: scales (and zero points) that are quantized themselves.

A row of scales is cut into groups; each group has a scale of its own, one for several hundred weights' scales.

* A signed format: symmetric around zero or, "asymmetric", around the mean of all scales, which is what the real zero
  point stands for: ``(q - z) * s`` with ``z = -mean / s``. (Dettmers et al., "QLoRA", 2023, section 3.)
* An unsigned format: from zero, or, "asymmetric", from the least to the greatest of each group.
* nf4, fp4 and the like: symmetric only, as they have no zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inc_graph.errors import ConfigError
from inc_graph.numerics import MIN_SCALE, quantize
from inc_graph.passes.qparams._levels import levels_of
from inc_graph.spec import SCHEMES, PerGroup, QSpec
from inc_graph.weights import Codes, narrow_scale

__all__ = ["ScaleOptions", "quantize_params"]


_NOTHING = 2.0**100  # stands for a scale of 0: rounds everything to 0, and can be divided by


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """How the scales of weights are kept: options that several algorithms have.

    Attributes:
        scale_type: Format of the scales' codes (double quantization); None: the scales are floats.
        scale_scheme: "symmetric", or "asymmetric": see the module's text.
        scale_group: How many scales share a scale; -1: all.
    """

    scale_type: str | None = None
    scale_scheme: str = "asymmetric"
    scale_group: int = 256

    def __post_init__(self) -> None:
        _check(self.scale_type, self.scale_scheme, self.scale_group)

    def keep_scale(self, scale: Tensor, half: bool = True) -> tuple[Tensor | Codes, Tensor]:
        """A float32 scale as it is kept, and the float32 values (never 0) that the codes of weights are to be found
        with, in the same shape. Floats are narrowed (if `half`) after that: their last bits do not matter to the codes.
        """
        if self.scale_type is None:
            return narrow_scale(scale) if half else scale, scale
        codes = quantize_params(scale, self.scale_type, self.scale_scheme, self.scale_group)
        values = codes.values().reshape(scale.shape)
        return codes, torch.where(values == 0, _NOTHING, values)


def _check(scale_type: str | None, scale_scheme: str, scale_group: int) -> None:
    """ConfigError if scales cannot be quantized so."""
    if scale_scheme not in SCHEMES:
        raise ConfigError(f"scale_scheme must be one of {', '.join(SCHEMES)}, not {scale_scheme!r}")
    if isinstance(scale_group, bool) or not isinstance(scale_group, int) or (scale_group < 2 and scale_group != -1):
        raise ConfigError(f"scale_group must be an integer of at least 2, or -1 for all scales, not {scale_group!r}")
    if scale_type is not None:
        qtype = levels_of(QSpec(scale_type)).qtype
        if scale_scheme == "asymmetric" and not qtype.is_int:
            raise ConfigError(
                f"scales in {qtype.name} have no zero point", hint='use scale_scheme="symmetric", or an integer format'
            )


def quantize_params(params: Tensor, qtype: str, scheme: str, group: int) -> Codes:
    """Codes of scales or zero points.

    Args:
        params: float32, any shape.
        qtype: Format of the codes.
        scheme: "symmetric" or "asymmetric"; see above.
        group: How many neighbours, in memory order, share a scale; -1: all.

    Returns:
        Codes ``[1, n]``, with a real zero point or none.
    """
    row = params.detach().float().reshape(1, -1)
    size = row.shape[1] if group == -1 else min(group, row.shape[1])
    missing = -row.shape[1] % size
    rows = torch.cat([row, row[:, -1:].expand(1, missing)], 1).reshape(-1, size)  # repeats widen no range
    levels = levels_of(QSpec(qtype))
    top = float(levels.qtype.qmax)
    zero: Tensor | None = None
    if not levels.qtype.is_int or (levels.qtype.signed and scheme == "symmetric"):
        scale, _ = levels.full_range(rows)
    elif levels.qtype.signed:
        mean = row.mean()
        scale, _ = levels.full_range(rows - mean)
        zero = -mean / scale
    elif scheme == "symmetric" and bool((row >= 0).all()):
        scale = (rows.amax(1, keepdim=True) / top).clamp_(min=MIN_SCALE)
    else:
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = (high - low) / top
        # where all are about the same any scale does: the zero point stands for the value
        scale = torch.where(scale > low.abs() * 1e-6, scale, low.abs()).clamp_(min=MIN_SCALE)
        zero = -low / scale
    codes = quantize(rows, scale, zero, (1, -1), levels.qtype).reshape(1, -1)[:, : row.shape[1]].contiguous()
    spec = QSpec(qtype, "symmetric" if zero is None else "asymmetric", PerGroup(size))
    return Codes(codes, scale.T.contiguous(), None if zero is None else zero.T.contiguous(), spec)
