"""What a config says that can have no effect: said in a warning that names the fields."""

from __future__ import annotations

import warnings

from inc_graph.errors import IncWarning
from inc_graph.quantization.base_config import BaseConfig

__all__ = ["warn_no_effect"]


def warn_no_effect(config: BaseConfig, stacklevel: int) -> None:
    """IncWarning for the fields of a config, its parts and its local settings that change nothing beside the others."""
    members = [c for m in config._members() for c in (m, *m._local.values())]
    said = dict.fromkeys(f"{type(c).__name__}.{text}" for c in members for text in c.without_effect())
    if said:
        warnings.warn(f"no effect: {'; '.join(said)}", IncWarning, stacklevel=stacklevel + 1)
