"""inc_graph: a graph compiler that quantizes PyTorch models.

Importing the package is cheap: torch is loaded by the submodules that need it. `inc_graph.quantization`, ...
`inc_graph.load_empty_model` are there without an import of their own.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PARTS = ("algorithms", "common", "export", "quantization", "utils")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"inc_graph.{name}")
    if name == "load_empty_model":
        return importlib.import_module("inc_graph.utils").load_empty_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PARTS, "load_empty_model"])
