"""Algorithms as text, `percentile{percent=99.99}` for a range estimator: one spelling for configs and recipes."""

from __future__ import annotations

import re
from typing import Any

from inc_graph.calibrate import RangeEstimator, estimator
from inc_graph.errors import ConfigError
from inc_graph.registry import ALGORITHMS
from inc_graph.weights import WeightAlgorithm, weight_algorithm

__all__ = ["make_algorithm", "make_estimator", "needs_inputs", "parse_algorithm"]

_FORM = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(?:\{([^{}]*)\})?\s*", re.S)


def parse_algorithm(text: str) -> tuple[str, dict[str, Any]]:
    """`name` or `name{option=value,...}` -> (name, options). ConfigError on any other form."""
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ConfigError(f"not an algorithm: {text!r}", hint="write it as name or name{option=value}")
    options: dict[str, Any] = {}
    for part in filter(None, map(str.strip, (found[2] or "").split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"algorithm {text!r}: expected option=value, found {part!r}")
        if (key := key.strip()) in options:
            raise ConfigError(f"algorithm {text!r}: option {key!r} given twice")
        options[key] = _value(value.strip())
    return found[1], options


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def make_estimator(text: str) -> RangeEstimator:
    """The range estimator that the text names. Errors as in `parse_algorithm` and `calibrate.estimator`."""
    name, options = parse_algorithm(text)
    return estimator(name, **options)


def make_algorithm(text: str) -> RangeEstimator | WeightAlgorithm:
    """What finds the codes of a weight: the weight algorithm, or else the range estimator, that the text names.

    Errors as in `parse_algorithm`, `weights.weight_algorithm` and `calibrate.estimator`.
    """
    name, options = parse_algorithm(text)
    cls = ALGORITHMS.get(name)
    if isinstance(cls, type) and issubclass(cls, WeightAlgorithm):
        return weight_algorithm(name, **options)
    return estimator(name, **options)


def needs_inputs(text: str) -> bool:
    """Whether the algorithm that the text names needs the inputs of the layer, and so calibration data."""
    if not text:
        return False
    cls = ALGORITHMS.get(parse_algorithm(text)[0])
    return isinstance(cls, type) and issubclass(cls, WeightAlgorithm) and cls.inputs
