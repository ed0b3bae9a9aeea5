"""How many layers of which class got which format, as a table of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inc_graph.common.logger import logger
from inc_graph.common.mode import Mode
from inc_graph.errors import ConfigError

__all__ = ["Statistics", "dump_model_op_stats"]


class Statistics:
    """A table that prints itself line by line.

    Args:
        data: Rows.
        header: Title.
        field_names: Of the columns.
        output_handle: Takes each line; the package's logger at level info by default.
    """

    def __init__(
        self,
        data: Sequence[Sequence[Any]],
        header: str,
        field_names: Sequence[str],
        output_handle: Callable[[str], Any] = logger.info,
    ) -> None:
        self.data, self.header, self.field_names, self.output_handle = data, header, field_names, output_handle

    def print_stat(self) -> None:
        """Give the table to the output."""
        for line in str(self).splitlines():
            self.output_handle(line)

    def __str__(self) -> str:
        rows = [[str(cell) for cell in row] for row in (self.field_names, *self.data)]
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        edge = "+".join(["", *("-" * (w + 2) for w in widths), ""])
        lines = ["|".join(["", *(f" {c:^{w}} " for c, w in zip(row, widths, strict=True)), ""]) for row in rows]
        return "\n".join([f"|{self.header:*^{len(edge) - 2}}|", edge, lines[0], edge, *lines[1:], edge])


def dump_model_op_stats(mode: Mode | str, tune_cfg: Mapping[tuple[str, Any], Any]) -> None:
    """Log how many layers of each class have which format. Nothing for `Mode.PREPARE`: nothing is quantized then.

    Args:
        mode: The phase.
        tune_cfg: (path, class) -> config, from `to_config_mapping`.
    """
    try:
        mode = Mode(mode)
    except ValueError:
        known = ", ".join(repr(m.value) for m in Mode)
        raise ConfigError(f"mode must be one of {known}, not {mode!r}") from None
    if mode is Mode.PREPARE:
        return
    counts: dict[str, Counter[str]] = {}
    for (_, kind), config in tune_cfg.items():
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        counts.setdefault(kind, Counter())[_format(config)] += 1
    formats = sorted({f for found in counts.values() for f in found} | {"FP32"})
    rows = [[kind, found.total(), *(found[f] for f in formats)] for kind, found in counts.items()]
    Statistics(rows, "Mixed Precision Statistics", ["Op Type", "Total", *formats]).print_stat()


def _format(config: Any) -> str:
    """What a config does to a layer, in a word: bits of activation and weight and the group size, or formats."""
    if config.leaves_float():
        return "FP32"
    fields = config.get_params_dict()
    if "bits" in fields and "group_size" in fields:
        return f"A32W{fields['bits']}G{fields['group_size']}"
    if "w_dtype" in fields and "act_dtype" in fields:
        return f"A({fields['act_dtype']})W({fields['w_dtype']})"
    return str(config.name).upper()
