"""Whether a part of a float model still computes what it did: on its calibration calls, and on what is made of them.

A block may take another way for one step, as in decoding, or for one sample, though calibration had no such call. So of
each kept call the first sample, and the first step, are tried as well. What the module cannot compute does not count: a
step with a cache, which is not kept, may not run without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inc_graph.quantization.block_inputs import copies
from inc_graph.quantization.hidden_runs import unseen
from inc_graph.quantization.kinds_of_calls import Call, kinds_of_calls, too_many_kinds

__all__ = ["Tried"]

_APART = {torch.float32: 1e-4, torch.float64: 1e-6}  # of what rounding moves; other dtypes are coarser
_COARSE = 5e-2
_MANY = 1 << 22  # elements of a result; of larger ones not all are kept


class Tried:
    """The results of a module, as they were at `start`.

    Args:
        module: Calls of it are kept.
        path: For messages.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path
        self.before: list[tuple[Call, list[Tensor]]] | None = None

    def start(self) -> bool:
        """Keep the results, unless that is done already. Whether there are some."""
        if self.before is not None:
            return bool(self.before)
        self.before = []
        calls = kinds_of_calls(self.module)
        for call in [*calls, *(less for whole in calls for less in _less(whole))]:
            with contextlib.suppress(Exception):  # the module is not made for it
                self.before.append((call, self._results(call)))
        return bool(self.before)

    def differs(self) -> str | None:
        """What the matter is, if results are not what they were; None if they are."""
        name = self.path or "the model"
        if too_many_kinds(self.module):
            return f"{name} was called in more ways than were kept to try it"
        if not self.before:
            return f"{name} cannot be run by itself"
        for call, before in self.before:
            try:
                after = self._results(call)
            except Exception as e:
                return f"{name} would fail: {type(e).__name__}"
            if len(before) != len(after) or not all(_alike(a, b) for a, b in zip(before, after, strict=True)):
                sizes = ", ".join(str(list(x.shape)) for x in pytree.tree_leaves(call) if isinstance(x, Tensor))
                return f"the results of {name} would be others, for inputs of sizes {sizes}"
        return None

    def _results(self, call: Call) -> list[Tensor]:
        args, kwargs = copies(call)
        with unseen(self.module), torch.no_grad():
            found = self.module(*args, **kwargs)
        results = [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]
        return [x.clone() if x.numel() <= _MANY else x.flatten()[:: x.numel() // _MANY + 1].clone() for x in results]


def _less(call: Call) -> Iterator[Call]:
    """The first sample of a call, and its first step: what has the size of dimension 0 (1) of the first tensor that has
    one, cut to 1 in this dimension, and in the others behind the first."""
    tensors = [x for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]
    for d in (0, 1):
        size = next((x.shape[d] for x in tensors if x.ndim > d), 1)
        if size > 1:

            def cut(x: Tensor, d: int = d, size: int = size) -> Tensor:
                for k in [0] if d == 0 else range(1, x.ndim):
                    x = x.narrow(k, 0, 1) if x.ndim > k and x.shape[k] == size else x
                return x

            yield pytree.tree_map_only(Tensor, cut, call)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether nothing but rounding is between two results."""
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    limit = _APART.get(a.dtype, _COARSE) * float(a.abs().max().clamp(min=1e-6))
    finite = a.isfinite() & b.isfinite()
    return float(torch.where(finite, (a - b).abs(), torch.where(a == b, 0.0, torch.inf)).max()) <= limit
