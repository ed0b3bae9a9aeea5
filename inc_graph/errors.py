"""Errors and warnings of the library: one small tree under :class:`IncError`.

Every error can carry the graph node, the module path and a hint, so a failure deep inside a pass still says where in
the user's model it happened and what to do next. Errors that a Python user would expect to be a ``ValueError`` or a
``KeyError`` are one as well.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "IncError",
    "IncWarning",
    "LoweringError",
    "MissingError",
    "PassError",
    "PatternError",
    "PrecisionWarning",
    "SavedModelError",
    "SpecError",
    "TrainingError",
    "UnknownNameError",
    "UnusedRuleWarning",
    "VerifyError",
]

# Dynamo writes the root of a captured model as L['self'] (or L['fn'] and the like); users never typed that.
_ROOT = re.compile(r"^L\[(['\"]).*?\1\]\.?")


class IncError(Exception):
    """Base of all errors raised on purpose by this library.

    Args:
        message: What went wrong, one sentence.
        node: Name of the graph node concerned, or the ``torch.fx.Node`` itself (its name is kept, never the node).
        module: Path of the module in the user's model, for example ``"layers.0.attn"``. Taken from the node's
            ``nn_module_stack`` if a node object is given and no path is.
        hint: What the user can do about it.

    The attributes ``message``, ``node``, ``module`` and ``hint`` hold these as strings or None.
    """

    def __init__(self, message: str, *, node: Any = None, module: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        if node is not None and not isinstance(node, str):
            module = module or _module_of(node)
            node = str(getattr(node, "name", node))
        self.message = message
        self.node: str | None = node
        self.module = module or None
        self.hint = hint

    def __str__(self) -> str:
        where = f"node '{self.node}'" if self.node else ""
        if self.module:
            where = f"{where} in module '{self.module}'" if where else f"module '{self.module}'"
        text = f"{self.message} [{where}]" if where else str(self.message)
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class ConfigError(IncError, ValueError):
    """A user-facing configuration is wrong: unknown argument, impossible combination."""


class MissingError(IncError, NotImplementedError):
    """A config asks for an algorithm that this version does not have."""


class SpecError(IncError, ValueError):
    """A number format, granularity or scale layout is wrong or does not fit the tensor."""


class CaptureError(IncError):
    """The model could not be captured as a graph in normal form."""


class CalibrationError(IncError):
    """Statistics are missing, empty or unusable."""


class TrainingError(IncError, ArithmeticError):
    """Quantization-aware training met values or gradients that are not finite."""


class PatternError(IncError):
    """A pattern or rule set is ill-formed, or does not settle."""


class PassError(IncError):
    """A pass failed, or did not keep its declared contract."""


class VerifyError(IncError):
    """A graph breaks a rule of the level it claims to be at."""


class LoweringError(IncError):
    """A backend could not lower a graph."""


class SavedModelError(IncError, ValueError):
    """A saved model is damaged, foreign, newer than this version, or not for this machine; or cannot be saved."""


class UnknownNameError(IncError, KeyError):
    """A name is not in the registry asked. Also a ``KeyError``."""


class IncWarning(UserWarning):
    """Base of all warnings of this library."""


class PrecisionWarning(IncWarning):
    """A half-precision format was asked for that this machine has no instructions for."""


class UnusedRuleWarning(IncWarning):
    """A rule of the user's recipe matched nothing."""


def _module_of(node: Any) -> str | None:
    """Innermost module path that ``node.meta["nn_module_stack"]`` records; duck-typed so that F0 needs no torch."""
    stack = (getattr(node, "meta", None) or {}).get("nn_module_stack")
    if not stack:
        return None
    last = list(stack.values())[-1]
    path = last[0] if isinstance(last, (tuple, list)) else last
    return _ROOT.sub("", str(path)) or None
