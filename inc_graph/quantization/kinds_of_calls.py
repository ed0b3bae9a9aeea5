"""Calibration calls of a model, and of its blocks, one of each kind: what it can be exported with and tried on.

A call's kind is what Python may take another way for: which arguments there are, their dtypes and ranks, which sizes
are 1, flags, and whether the module trains. One call of each kind is kept, and some that differ in other sizes or
numbers alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from inc_graph.quantization.block_inputs import copies, without_caches

__all__ = ["first_call", "forget_first_calls", "keep_first_calls", "kinds_of_calls", "too_many_kinds", "was_called"]

_KEY = "_inc_first_call"
_KINDS = 16
_MORE = 4  # calls of a kind that is known,
_BYTES = 1 << 24  # as long as all that is kept of a module is less
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Kept:
    """Calls as copies, the kinds and the exact forms of those that are kept. `full`: of some kinds none is."""

    calls: list[Call] = field(default_factory=list)
    kinds: set[Any] = field(default_factory=set)
    forms: set[Any] = field(default_factory=set)
    size: int = 0  # in bytes
    full: bool = False

    def wants(self, kind: Any, form: Any) -> bool:
        """Whether something may be learnt from such a call."""
        more = len(self.calls) < len(self.kinds) + _MORE and self.size < _BYTES
        return kind not in self.kinds or (form not in self.forms and more)


def keep_first_calls(model: nn.Module, paths: Iterable[str]) -> None:
    """Let modules at these paths keep copies of the arguments that they are called with, one call of each kind."""
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(_keep, with_kwargs=True)


def kinds_of_calls(module: nn.Module) -> list[Call]:
    """Copies of the arguments, without caches of keys and values; the first call first."""
    known: _Kept | None = module.__dict__.get(_KEY)
    if known is None:
        return []
    names = list(inspect.signature(module.forward).parameters)
    found = []
    for args, kwargs in copies(known.calls):
        if "use_cache" in names[len(args) :]:
            kwargs["use_cache"] = False  # a cache is no result that an export could give
        found.append((args, kwargs))
    return found


def first_call(module: nn.Module) -> Call | None:
    """The first of them; None before a call."""
    return next(iter(kinds_of_calls(module)), None)


def was_called(module: nn.Module) -> bool:
    """Whether a call is kept."""
    return _KEY in module.__dict__


def too_many_kinds(module: nn.Module) -> bool:
    """Whether there were kinds of calls of which none is kept."""
    known: _Kept | None = module.__dict__.get(_KEY)
    return known is not None and known.full


def forget_first_calls(model: nn.Module) -> None:
    """Keep none any more, and drop what is kept."""
    for module in model.modules():
        module.__dict__.pop(_KEY, None)
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _keep]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _keep(module: nn.Module, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    known: _Kept = module.__dict__.get(_KEY) or _Kept()
    given = without_caches((args, kwargs))
    leaves, tree = pytree.tree_flatten(given)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not tensors or any(isinstance(x, FakeTensor) or x.is_meta or not x.numel() for x in tensors):
        return
    kind, form = ((module.training, str(tree), *(look(x) for x in leaves)) for look in (_kind, _form))
    if not known.wants(kind, form):
        return
    if any(bool(x.isnan().any()) for x in tensors if x.is_floating_point()):  # masks may be infinite
        return
    module.__dict__[_KEY] = known
    if kind not in known.kinds and len(known.kinds) >= _KINDS:
        known.full = True
        return
    known.kinds.add(kind)
    known.forms.add(form)
    known.calls.append(copies(given))
    known.size += sum(x.nbytes for x in tensors)


def _kind(x: Any) -> Any:
    """What a way through Python is most likely to depend on."""
    if isinstance(x, Tensor):
        return x.dtype, tuple(min(n, 2) for n in x.shape)
    if isinstance(x, int | float) and not isinstance(x, bool):
        return type(x).__name__, min(max(x, -1), 2) if isinstance(x, int) else None
    return x if isinstance(x, bool | str | torch.dtype | None) else type(x).__name__


def _form(x: Any) -> Any:
    """All that it may depend on but the values of tensors."""
    if isinstance(x, Tensor):
        return x.dtype, tuple(x.shape)
    return x if isinstance(x, bool | int | float | str | torch.dtype | None) else type(x).__name__
