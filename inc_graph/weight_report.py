"""What became of each quantized weight: format, bytes, error, and what its algorithm has to say. Prints as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import fx

from inc_graph.errors import ConfigError
from inc_graph.graph import module_path, peek_meta
from inc_graph.oppattern import argument, pattern_of
from inc_graph.options import parse_algorithm
from inc_graph.registry import ALGORITHMS
from inc_graph.tables import printed

__all__ = ["WeightLine", "Weights", "low_ranks", "raised_dampings", "weight_lines"]


@dataclass(frozen=True)
class WeightLine:
    """One layer with a quantized weight.

    Attributes:
        name: Path of its module, or its name in the graph.
        form: Number format, and the weights that share a scale.
        algorithm: With its options.
        bytes: Of codes, scales, zero points, and the order of the inputs if it is another.
        seconds: That the algorithm took.
        rounded: Relative error if each weight were rounded for itself; None if that is what was done, or not measured.
        error: Relative error of what was done: ``|W - W_q| / |W|``, or of the outputs where the algorithm knows inputs.
        damping: What was added to the diagonal of the Hessian, relative to its mean; None if there is none.
        rank: Of the calibration data, if it is less than the layer has inputs: rows, independent ones, inputs that were
            not always 0, whichever is least; else None.
        dead: Inputs that were 0 in all of the calibration data, if there are any.
        fp8_scale: With `fp8_aware`: the power of two over which ``code * scale`` is a number of fp8 e4m3.
    """

    name: str
    form: str
    algorithm: str
    bytes: int
    seconds: float
    rounded: float | None = None
    error: float | None = None
    damping: float | None = None
    rank: int | None = None
    dead: int | None = None
    fp8_scale: float | None = None

    @classmethod
    def from_json(cls, data: Any) -> WeightLine:
        """ConfigError that names the field if the data is not of that form."""
        names = [f.name for f in fields(cls)]
        data = {"dead": None, "fp8_scale": None, **data} if isinstance(data, dict) else data  # lines had none at first
        if not isinstance(data, dict) or set(data) != set(names):
            raise ConfigError(f"Report.weights: a line has the fields {names}")
        for name, value in data.items():
            text = name in ("name", "form", "algorithm")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            optional = value is None and name not in ("bytes", "seconds")
            if not (isinstance(value, str) if text else number or optional):
                raise ConfigError(f"Report.weights: {name} cannot be {value!r}"[:120])
        return cls(**data)


class Weights(list[WeightLine]):
    """Lines of all layers; print it."""

    def __str__(self) -> str:
        return printed(self)

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="quantized weights", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("format")
        for name in ("bytes", "seconds", "rounded", "error", "damping"):
            table.add_column(name, justify="right")
        for x in self:
            numbers = [f"{x.bytes:,}", f"{x.seconds:.2f}", _share(x.rounded), _share(x.error), _share(x.damping)]
            table.add_row(Text(x.name), x.form, *numbers)
        return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def weight_lines(gm: fx.GraphModule) -> Weights:
    """The lines of a Q-DQ graph, from what `convert-qdq` has noted. A layer that is called several times has one."""
    found = Weights()
    seen: set[tuple[fx.Node, str]] = set()
    for node in gm.graph.nodes:
        weight = peek_meta(node).get("weight", {})
        if (notes := weight.get("notes")) is None:
            continue
        pattern = pattern_of(node)
        if pattern is not None and pattern.weight is not None:
            layer: tuple[fx.Node, str] = argument(node, pattern.weight), module_path(node)
            if layer in seen:
                continue
            seen.add(layer)
        spec = weight["spec"]
        size = spec["granularity"].get("sizes") or spec["granularity"]["kind"]
        names = {"rounded": "rtn_error", "error": "error", "damping": "damping"}
        names |= {name: name for name in ("rank", "dead", "fp8_scale")}
        known = {field: _number(notes[name]) for field, name in names.items() if name in notes}
        name = module_path(node) or node.name
        form = f"{spec['qtype']} {size}"
        found.append(WeightLine(name, form, weight["algorithm"], notes["bytes"], notes["seconds"], **known))
    return found


def raised_dampings(lines: Sequence[WeightLine]) -> str | None:
    """A note of layers whose Hessian was damped more than was asked for; None if there are none."""
    raised = [x for x in lines if x.damping is not None and x.damping > _asked(x.algorithm) * (1 + 1e-6)]
    if not raised:
        return None
    shown = ", ".join(f"{x.name} ({x.damping:g})" for x in raised[:3]) + (", ..." if len(raised) > 3 else "")
    return f"percdamp was raised where the Hessian is not positive definite with what was asked for: {shown}"


def _asked(algorithm: str) -> float:
    name, options = parse_algorithm(algorithm)
    default = getattr(ALGORITHMS.get(name), "percdamp", math.inf)
    return float(options.get("percdamp", default))


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def low_ranks(lines: Sequence[WeightLine]) -> str | None:
    """A warning for layers whose calibration data is of less rank than they have inputs; None if all saw enough."""
    low = [x for x in lines if x.rank is not None]
    if not low:
        return None
    shown = ", ".join(f"{x.name} (rank {x.rank})" for x in low[:3]) + (", ..." if len(low) > 3 else "")
    few = f"{len(low)} layer{'s' * (len(low) > 1)} saw fewer rows of calibration data than inputs"
    few += ", or rows that depend on each other or leave inputs at 0"
    return f"{few}, so their Hessian is singular and rounding may fit the data too closely: {shown}"
