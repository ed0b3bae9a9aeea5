"""Whether the blocks of a model are a chain in a call, and what comes into the first of them.

A chain: each block is called once, in order; its first argument is what the one before it gave, which nobody has
written to since; all else is the same for each of them; and layers within the blocks are called by their blocks alone.

It is looked at in every calibration call. The first runs through the whole model. In the others blocks compute nothing:
each gives a tensor without values, so that what the model does between and behind them costs next to nothing, and is
still seen: masks made for each kind of block, another pass through all of them, an early exit. Where the model's way
depends on such values, as it would for a confidence that ends it early, that call runs through the whole model, too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from inc_graph.errors import CalibrationError
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.not_computed import NotComputed
from inc_graph.quantization.without_values import Form, Stop

__all__ = ["Chain", "Reads", "copies", "is_cache", "same", "without_caches"]


@dataclass
class Chain:
    """What is seen in one call of a model.

    Args:
        paths: Of the blocks.
        batch: Number of the call.

    Attributes:
        why_not: The reason why it is no chain; "" if there is none yet.
        fault: What the call has to fail with.
        unsure: The call has to run through the whole model: what it does depends on what blocks compute.
        first: (what flows, the keyword that it is passed by, the other arguments) of the first block, as copies.
        forms: What each block gives.
        reads_all: Something but the next block reads what a block gives that is not the last one.
        at_head: The output head was called behind the blocks.
        before: Paths of the layers that were called before the first block.
        behind: Of those that were called after it, outside of blocks, and have to see their inputs.
    """

    paths: list[str]
    batch: int
    why_not: str = ""
    fault: CalibrationError | None = None
    unsure: bool = False
    first: tuple[Tensor, str | None, tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    forms: list[Form] = field(default_factory=list)
    reads_all: bool = False
    at_head: bool = False
    before: set[str] = field(default_factory=set)
    behind: set[str] = field(default_factory=set)
    _at: int = 0
    _inside: bool = False
    _given: Tensor | None = None  # by the block before
    _mark: Any = None  # what tells whether it was written to
    _shape: Any = None
    _rest: list[tuple[Any, Any, Any]] = field(default_factory=list)  # the first block's arguments, marks, copies

    _others: list[weakref.ref[Tensor]] = field(default_factory=list)  # what all blocks but the last one gave

    @property
    def at_end(self) -> bool:
        """Whether all blocks have been, and nothing has gone wrong."""
        return not self.why_not and self._at == len(self.paths)

    @property
    def failed(self) -> str:
        """The reason why the blocks were no chain, once the call is over."""
        return self.why_not or ("" if self.at_end else f"{_ORDER}: {self.paths[self._at]} is not called")

    # --------------------------------------------------------------------------------------------------------- blocks
    def enter(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block is called."""
        if self.why_not:
            return
        self.why_not = self._why_not(i, args, kwargs)
        if self.why_not:
            raise Stop(self.why_not)  # nothing else need be known
        self._inside = True

    def _why_not(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        path = self.paths[i]
        if self._inside or i != self._at:
            where = "within another" if self._inside else "again" if i < self._at else f"before {self.paths[self._at]}"
            return f"{_ORDER}: {path} is called {where}"
        x, name, rest = _split(args, kwargs)
        if not isinstance(x, Tensor):
            return _turns(path)
        self._shape = x.shape
        mine = pytree.tree_leaves(rest, is_leaf=is_cache)
        if i == 0:
            if any(is_cache(v) and _length(v) for v in mine):
                return "its first block is called with keys and values of an earlier call"
            self._begin(x, name, rest, mine)
            return ""
        if x is not self._given:
            return f"what comes behind block {self.paths[i - 1]} is not what it gives"
        if not _unwritten(x, self._mark):
            return f"what block {self.paths[i - 1]} gives is written to before block {path} reads it"
        if any(isinstance(v, FakeTensor | NotComputed) for v in mine):
            self.unsure = True
            raise Stop("what a block is called with depends on a block before it")
        assert self.first is not None
        alike = name == self.first[1] and len(mine) == len(self._rest)
        if not alike or not all(_like(v, *kept) for v, kept in zip(mine, self._rest, strict=True)):
            return f"block {path} is called with other arguments than the first"
        return ""

    def _begin(self, x: Tensor, name: str | None, rest: Any, mine: list[Any]) -> None:
        if x.is_floating_point() and not bool(x.isfinite().all()):
            nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
            self.fault = CalibrationError(
                f"calibration batch {self.batch}: {nan} NaN and {inf} infinite values of {x.numel()}"
                " reach the first block", module=self.paths[0], hint="check that batch",
            )  # fmt: skip
            raise self.fault
        kept = copies(without_caches(rest))
        self.first = copies(x), name, kept
        self._rest = [(v, _mark(v), copies(v)) for v in mine]

    def leave(self, i: int, result: Any) -> None:
        """A block has given something."""
        if self.why_not:
            return
        self._inside = False
        given = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(given, Tensor) or given.shape != self._shape:
            self.why_not = _turns(self.paths[i])
            raise Stop(self.why_not)
        self.forms.append(Form.of(result))
        self._given, self._mark = given, _mark(given)
        self._at += 1
        if self._at < len(self.paths):
            self._others.append(weakref.ref(given))

    def read(self, function: Any, arguments: Any, result: Any) -> None:
        """A function of torch was called."""
        if self._inside or self.reads_all or not self._others or _is_form(function, result):
            return
        others = [x for ref in self._others if (x := ref()) is not None]
        read = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
        self.reads_all = any(x is other for x in read for other in others)

    # --------------------------------------------------------------------------------------------------------- layers
    def called(self, leaf: Leaf, block: bool) -> None:
        """A layer is called; `block`: it stands in one of the blocks."""
        if self.why_not or block == self._inside:
            return
        if block or self._inside:
            self.why_not = f"layer {leaf.path} stands {'in' if block else 'outside of'} its blocks and is called " + (
                "outside of them, too" if block else "in them"
            )
            raise Stop(self.why_not)

    def note(self, leaf: Leaf, collects: bool) -> None:
        """A layer outside of the blocks is called; `collects`: it has to see its inputs."""
        if self._at == 0:
            self.before.add(leaf.path)
        elif collects:
            self.behind.add(leaf.path)


_ORDER = "its blocks are not called one after the other, each once"


def _turns(path: str) -> str:
    return f"block {path} does not turn one tensor into another of its shape"


class Reads(TorchFunctionMode):
    """Tells a chain what is read."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.chain.read(function, (args, kwargs), result)
        return result


_ASKS = {"__bool__", "__int__", "__index__", "item", "equal", "allclose", "is_nonzero"}


def _is_form(function: Any, result: Any) -> bool:
    """Whether a function tells the form of a tensor, and nothing of its values."""
    parts = result if isinstance(result, tuple) else (result,)
    kinds = bool | int | str | torch.dtype | torch.device | torch.layout
    return getattr(function, "__name__", "") not in _ASKS and all(x is None or isinstance(x, kinds) for x in parts)


# ------------------------------------------------------------------------------------------------------- the arguments
def copies(tree: Any) -> Any:
    """The same arguments with tensors of their own, which are none of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), tree)


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, str | None, tuple[tuple[Any, ...], dict[str, Any]]]:
    """(what flows, the keyword that it is passed by, the rest) of a block's arguments. Nothing flows: None."""
    if args:
        return args[0], None, (args[1:], kwargs)
    name = next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if name is None:
        return None, None, ((), {})
    return kwargs[name], name, ((), {k: v for k, v in kwargs.items() if k != name})


def without_caches(rest: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The rest of the arguments without a cache of keys and values: each replay would add to it."""
    args, kwargs = pytree.tree_map(lambda v: None if is_cache(v) else v, rest, is_leaf=is_cache)
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return args, kwargs


def is_cache(value: Any) -> bool:
    """Whether it is a cache of keys and values, as those of transformers."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _length(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except Exception:  # of a cache that asks for more, or cannot tell
        return 0


def _mark(x: Any) -> Any:
    """What changes when a tensor is written to: its version, or all its values where it has none."""
    if not isinstance(x, Tensor):
        return None
    return copies(x) if x.is_inference() else x._version


def _unwritten(x: Any, mark: Any) -> bool:
    if not isinstance(x, Tensor):
        return True
    return bool(same(x, mark) if isinstance(mark, Tensor) else x._version == mark)


def _like(value: Any, first: Any, mark: Any, kept: Any) -> bool:
    """Whether a block is called with what the first one was called with."""
    return (value is first and _unwritten(first, mark)) or same(value, kept)


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are the same to a block."""
    if a is b or (is_cache(a) and is_cache(b)):
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)
    try:
        return bool(a == b)
    except Exception:
        return False
