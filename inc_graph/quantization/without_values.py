"""Modules that compute nothing: in a call that only shows which way it goes, they give tensors without values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from inc_graph.quantization.not_computed import NotComputed, leave_alone

__all__ = ["Form", "Seen", "Stop", "without_head", "without_values"]


class Stop(ValueError):
    """Ends a call of the model behind the last thing that is wanted of it. A ValueError: calibration loops that were
    written for neural_compressor catch that."""


class Seen(Protocol):
    """What is known of the call by now; see `Chain`."""

    first: Any
    at_head: bool

    @property
    def at_end(self) -> bool: ...


@dataclass(frozen=True)
class Form:
    """What a block gives: a tensor, in a tuple or not, and maybe more.

    Attributes:
        tree: Where it is.
        more: Of each of the others, whether there is one (or `None`).
        dtype: Of the tensor.
    """

    tree: Any
    more: tuple[bool, ...]
    dtype: torch.dtype

    @staticmethod
    def of(result: Any) -> Form:
        """That of a result whose first part is a tensor."""
        leaves, tree = pytree.tree_flatten(result, is_leaf=lambda x: x is None)
        return Form(tree, tuple(x is not None for x in leaves[1:]), leaves[0].dtype)

    def holding(self, x: Tensor) -> Any:
        """Such a result. Whoever reads the rest of it fails."""
        return pytree.tree_unflatten([x, *(NotComputed() if some else None for some in self.more)], self.tree)


@contextlib.contextmanager
def without_values(blocks: Mapping[int, nn.Module], forms: list[Form], chain: Seen) -> Iterator[None]:
    """Blocks compute nothing: each gives a tensor of its form that has no values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def stub(form: Form) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert chain.first is not None
            x = chain.first[0]
            with torch.inference_mode(False), mode:
                return form.holding(torch.empty(x.shape, dtype=form.dtype, device=x.device))

        return forward

    own = {i: block.__dict__.get("forward") for i, block in blocks.items()}
    try:
        for i, block in blocks.items():
            block.__dict__["forward"] = stub(forms[i])
        yield
    finally:
        for i, block in blocks.items():
            del block.__dict__["forward"]
            if own[i] is not None:
                block.__dict__["forward"] = own[i]


@contextlib.contextmanager
def without_head(head: Any, chain: Seen) -> Iterator[None]:
    """The output head behind the blocks gives a tensor without values; if its size is not known, the call ends."""
    if not isinstance(head, nn.Module):
        yield
        return
    own, forward = head.__dict__.get("forward"), head.forward
    size = getattr(head, "out_features", None)

    def stub(*args: Any, **kwargs: Any) -> Any:
        if not chain.at_end and not chain.at_head:
            return forward(*args, **kwargs)
        chain.at_head = True
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(size, int) or not isinstance(x, Tensor):
            raise Stop("nothing but the output head is left")
        leave_alone(head)
        mode = x.fake_mode if isinstance(x, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
        with torch.inference_mode(False), mode:
            return torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)

    try:
        head.__dict__["forward"] = stub
        yield
    finally:
        del head.__dict__["forward"]
        if own is not None:
            head.__dict__["forward"] = own
