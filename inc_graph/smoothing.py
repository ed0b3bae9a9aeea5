"""How the inputs of layers are smoothed, as configs say it, recipes carry it and passes carry it out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor

from inc_graph.errors import ConfigError
from inc_graph.options import parse_algorithm
from inc_graph.smooth_report import SmoothLine

__all__ = ["ABSORBED", "CRITERIA", "SAMPLES", "WHY", "Absorbed", "FoldingError", "Smoothing"]


class FoldingError(ConfigError):
    """A norm was to take a scale in, and has no weight to."""


ABSORBED = "inc_absorbed"
"""Key of the `meta` of a graph under which `absorb-scales` leaves a list of `Absorbed`, and under `WHY` the reasons of
others: {path of a layer: text}."""

WHY = "inc_not_absorbed"

SAMPLES = 32
CRITERIA = ("max", "min", "mean")


@dataclass(frozen=True)
class Smoothing:
    """How the input of a layer is to be smoothed; in recipes as text, `smooth{alpha=0.5}`.

    Attributes:
        alpha: 0 to 1, or "auto".
        folding: Only where a producer takes the scale in; False: where none can, the input is multiplied.
        scale_sharing: Layers that read one input are multiplied once, by one scale; False: each by its own.
        init_alpha, alpha_min, alpha_max, alpha_step: Of the search; the first is also what counts without data.
        shared_criterion: How errors of layers with one scale come to one: "max", "min", "mean".
        do_blockwise: Search by the error of what the block of the layers gives.
        n_samples: Entries of the first dimension of calibration data that the search looks at.
    """

    alpha: float | str = 0.5
    folding: bool = False
    scale_sharing: bool = False
    init_alpha: float = 0.5
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    alpha_step: float = 0.1
    shared_criterion: str = "max"
    do_blockwise: bool = False
    n_samples: int = SAMPLES

    def __post_init__(self) -> None:
        for name in ("init_alpha", "alpha_min", "alpha_max", *(["alpha"] if self.alpha != "auto" else [])):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"smooth: {name} must be a number from 0 to 1, not {value!r}")
        if self.alpha_min > self.alpha_max or not self.alpha_step > 0:
            raise ConfigError(f"smooth: no alpha from {self.alpha_min} to {self.alpha_max} by {self.alpha_step}")
        if isinstance(self.n_samples, bool) or not isinstance(self.n_samples, int) or self.n_samples < 1:
            raise ConfigError(f"smooth: n_samples must be a whole number of at least 1, not {self.n_samples!r}")
        if self.shared_criterion not in CRITERIA:
            raise ConfigError(f"smooth: shared_criterion is one of {', '.join(CRITERIA)}, not {self.shared_criterion}")

    @property
    def auto(self) -> bool:
        """Whether alpha is searched for."""
        return self.alpha == "auto"

    @property
    def grid(self) -> tuple[float, float, float, float]:
        """First, least and greatest alpha of the search, and its step."""
        return self.init_alpha, self.alpha_min, self.alpha_max, self.alpha_step

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return "smooth" + (f"{{{','.join(changed)}}}" if changed else "")

    @classmethod
    def parse(cls, text: str) -> Smoothing:
        """Inverse of `str`. ConfigError on anything else."""
        name, options = parse_algorithm(text)
        known = {f.name for f in fields(cls)}
        if name != "smooth" or not set(options) <= known:
            raise ConfigError(f"not a smoothing: {text!r}", hint=f"smooth{{...}} with {', '.join(sorted(known))}")
        return cls(**options)


class Absorbed(NamedTuple):
    """A value whose scale parameters of the model take in.

    Attributes:
        layers: Paths of the layers that read it.
        together: Of all layers whose scale is this one; it is put in for all of them or for none.
        line: For the report.
        scale: What each channel is divided by: float32 [channels].
        factors: {name of a parameter: what it is multiplied by}, those of all `together`; in the first of them only.
    """

    layers: tuple[str, ...]
    together: tuple[str, ...]
    line: SmoothLine
    scale: Tensor
    factors: dict[str, Tensor]
