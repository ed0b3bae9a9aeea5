"""The first calibration call of a model, and of its blocks: what it can be exported with, to look at it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from inc_graph.quantization.block_inputs import copies, without_caches

__all__ = ["first_call", "forget_first_calls", "keep_first_calls"]

_KEY = "_inc_first_call"


def keep_first_calls(model: nn.Module, paths: Iterable[str]) -> None:
    """Let modules at these paths keep copies of the arguments that they are called with first."""
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(_keep, with_kwargs=True)


def first_call(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Copies of the arguments, without caches of keys and values; None before a call."""
    known = module.__dict__.get(_KEY)
    if known is None:
        return None
    args, kwargs = copies(known)
    names = list(inspect.signature(module.forward).parameters)
    if "use_cache" in names[len(args) :]:
        kwargs["use_cache"] = False  # a cache is no result that an export could give
    return args, kwargs


def forget_first_calls(model: nn.Module) -> None:
    """Keep none any more, and drop what is kept."""
    for module in model.modules():
        module.__dict__.pop(_KEY, None)
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _keep]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _keep(module: nn.Module, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or _KEY in module.__dict__:
        return
    given = without_caches((args, kwargs))
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    floats = [x for x in tensors if x.is_floating_point()]
    if tensors and not any(isinstance(x, FakeTensor) or x.is_meta or not x.numel() for x in tensors):
        if all(not bool(x.isnan().any()) for x in floats):  # masks may be infinite
            module.__dict__[_KEY] = copies(given)
