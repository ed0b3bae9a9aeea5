"""A checkpoint of training, before any of it is loaded: are its learned scales those of the model's formats?

A learned scale that is taken for one of another format is a wrong number that nothing shows: training goes on from it.
Tracked ranges are those of values, whatever they are rounded to, and may go from one format to another.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from inc_graph.errors import IncWarning
from inc_graph.fake_quantizer import FakeQuantizer, TrackedRange
from inc_graph.learned_step import LearnedStep, format_in, other_format

__all__ = ["check_loading", "leave_loading"]


def check_loading(model: nn.Module) -> None:
    """Let `load_state_dict` of a prepared model refuse scales of another format, with nothing loaded."""
    leave_loading(model)
    model.register_load_state_dict_pre_hook(_look)


def leave_loading(model: nn.Module) -> None:
    """Do so no more."""
    hooks = model._load_state_dict_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "hook", None) is _look]:
        del hooks[key]


def _look(model: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    silent: list[FakeQuantizer] = []
    wrong: list[tuple[FakeQuantizer, str]] = []
    for name, quantizer in model.named_modules():
        if not isinstance(quantizer, FakeQuantizer):
            continue
        at = f"{prefix}{name}."
        learned, tracked = at + "step" in state_dict, at + "low" in state_dict
        if learned and isinstance(quantizer, LearnedStep):
            found = format_in(state_dict, at, quantizer)
            if found is None:
                silent.append(quantizer)
            elif found != quantizer.spec:
                wrong.append((quantizer, f"learned for {found}"))
        elif learned:
            text = format_in(state_dict, at, quantizer) or "a format that it does not say"
            wrong.append((quantizer, f"learned for {text}"))
        elif tracked and not isinstance(quantizer, TrackedRange):
            wrong.append((quantizer, "a range that training tracked"))
    if wrong:
        raise other_format(*wrong[0], len(wrong) - 1)
    if silent:
        text = "the checkpoint does not say for which format its scales were learned, so they are taken for those of "
        text += f"the model ({silent[0].what} of {silent[0].path or 'the model'}: {silent[0].spec})"
        warnings.warn(text, IncWarning, stacklevel=6)
