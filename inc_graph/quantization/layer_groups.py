"""Layers of a block that read the same tensor, and what is collected of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inc_graph.products import add_products
from inc_graph.quantization.block_inputs import grams
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.streaming import float_layer

__all__ = ["Apart", "Group", "Pause", "input_of", "twin_of"]

_ROWS = 4096


@dataclass
class Group:
    """Layers that read the same tensor, and the products of what was seen of it."""

    leaves: list[Leaf]
    total: Tensor | None = None
    rows: int = 0
    last: Tensor | None = None
    known: dict[Any, Any] = field(default_factory=dict)
    waiting: Tensor | None = None  # room for rows that are not multiplied yet: many at once are faster
    filled: int = 0

    def take(self, x: Tensor) -> None:
        if x is self.last:
            return
        self.last = x
        rows = x.detach().reshape(-1, x.shape[-1])
        self.rows += len(rows)
        if self.waiting is None:  # of the dtype that the layers multiply
            kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else rows.dtype
            self.waiting = rows.new_empty(_ROWS, rows.shape[1], dtype=kind)
        while len(rows):
            some = rows[: _ROWS - self.filled]
            self.waiting[self.filled : self.filled + len(some)] = some
            self.filled, rows = self.filled + len(some), rows[len(some) :]
            if self.filled == _ROWS:
                self.multiply()

    def multiply(self) -> None:
        if self.waiting is not None and self.filled:
            self.total = add_products(self.total, self.waiting[: self.filled], inplace=True)
            self.filled = 0

    def seen(self) -> None:
        """All calls have been."""
        self.multiply()
        self.last = self.waiting = None

    def fill(self, leaf: Leaf) -> None:
        """Give a layer's observers what was seen."""
        for observer in grams(leaf):
            observer.total, observer.count, observer.known = self.total, self.rows, self.known
            observer.elements = self.rows * self.total.shape[0]  # type: ignore[union-attr]


class Pause(NamedTuple):
    """What a call brings where it waits: the first layer of a group, and what that is about to read."""

    leaf: Leaf
    x: Tensor


class Apart(Exception):
    """Layers that read one tensor in one call read several in another."""


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def twin_of(leaf: Leaf, converted: Leaf | None) -> nn.Module:
    """The float layer of a leaf; of one that is rounded, with the values of its rounded weight."""
    twin = copy.copy(float_layer(leaf))
    twin.__dict__["_forward_pre_hooks"] = type(twin._forward_pre_hooks)()
    values = {name: None if p is None else p.detach() for name, p in twin._parameters.items()}
    if converted is not None:
        values["weight"] = converted.weight.detach().to(values["weight"].dtype)  # type: ignore[union-attr]
    # parameters that want a gradient: autocast keeps the casts of such, and casts others at each call
    twin._parameters = {name: None if v is None else nn.Parameter(v) for name, v in values.items()}
    return twin
