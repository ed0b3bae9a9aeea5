"""Layers that are called inside `torch.cond`, `while_loop` and the like.

Such an operator traces its branches at each call, also in eager mode, and a trace can neither collect ranges nor call a
kernel that is no operator. A leaf there hands the call to its float layer. It cannot note that on itself either, since
a trace refuses side effects; what a trace takes for a constant is computed by running it, so the note is taken there.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from torch import nn

__all__ = ["enroll", "stays_float"]

_REASON = "it is called inside torch.cond or another control-flow operator"
_numbers = itertools.count(1)
_leaves: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def enroll(leaf: nn.Module) -> int:
    """A number by which `stays_float` finds the leaf."""
    number = next(_numbers)
    _leaves[number] = leaf
    return number


def stays_float(number: int) -> bool:
    """Whether the leaf is being traced as a part of a branch; it is marked to stay float then."""
    if not _in_branch():
        return False
    if (leaf := _leaves.get(number)) is not None:
        leaf.reason = _REASON
    return True


stays_float._dynamo_marked_constant = True  # type: ignore[attr-defined]
# what torch.compiler.assume_constant_result does, which imports the compiler to do so: two seconds


def _in_branch() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except AttributeError:  # there is no saying: the float layer is never wrong
        return True
