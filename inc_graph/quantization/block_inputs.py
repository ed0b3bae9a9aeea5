"""Calibration that stops at the first block of a model: the rest is computed block by block when it is converted.

A model of repeated blocks (the decoder layers of a language model) is quantized one block after the other, and each is
calibrated on what the quantized blocks before it give (Frantar et al. 2022, section 4). So while the user's data runs,
only the inputs of the first block are wanted. They are kept, and the call ends there.

The first batch runs through the whole model once, to see that the blocks are a chain: each is called once, in order,
its first argument is what the one before it gave, and all else is the same for each of them. Where that does not hold,
calibration goes on over the whole model, and each layer is rounded on its own inputs in the float model.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inc_graph.aside import Aside, Kept, Waiting
from inc_graph.errors import CalibrationError
from inc_graph.gram import GramObserver
from inc_graph.quantization.finish import observers_of
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.streaming import is_streamed

__all__ = [
    "BlockInputs", "Call", "NotComputed", "block_inputs_of", "block_paths", "copies", "grams", "stop_at_blocks", "undo",
    "without_caches",
]  # fmt: skip

_MARK = "_inc_block_inputs"


class Stop(ValueError):
    """Ends a call of the model behind the last thing that is wanted of it. A ValueError: calibration loops that were
    written for neural_compressor catch that."""


class NotComputed:
    """What a prepared model gives while it is calibrated: there is no output, as the call ended early."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise CalibrationError(
            "this output was not computed: calibration stops as soon as it has the inputs that it needs",
            hint="run calibration data as prepared(batch) and leave the result alone; evaluate the model after convert",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __add__ = __sub__ = __mul__ = _refuse

    def __repr__(self) -> str:
        return "<not computed: calibration stops at the inputs that it needs>"


@dataclass
class Call:
    """Arguments of one call of a block, as copies: whoever calls may use the memory again.

    Attributes:
        hidden: What flows from block to block; it may wait in a file.
        name: The keyword that it is passed by; None: it is the first argument.
        args, kwargs: The others.
        whole: Arguments of the model's call, if its tail is wanted.
    """

    hidden: Tensor | Waiting
    name: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    whole: tuple[tuple[Any, ...], dict[str, Any]] | None

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """What a block makes of `hidden`. It gets copies, so it may write to what it is given."""
        args, kwargs = copies((self.args, self.kwargs))
        if self.name is None:
            return block(hidden.clone(), *args, **kwargs)
        return block(*args, **{self.name: hidden.clone()}, **kwargs)


def copies(tree: Any) -> Any:
    """The same arguments with tensors of their own, which are none of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), tree)


@dataclass
class BlockInputs:
    """What is known of a model's blocks, and the calls that calibration has left.

    Attributes:
        paths: Of the blocks, in the order in which they run.
        wants_tail: Whether a layer behind the blocks has to see its inputs too.
        calls: One for each call of the model.
        chain: None until the first batch was seen; then "" or the reason why the blocks are none.
        tuples: Whether a block gives a tuple, its first item being what goes on.
        aside: Where what flows from block to block waits; None: in memory.
        closed: Calibration is over: calls run the whole model, and are not kept.
    """

    paths: list[str]
    wants_tail: bool = False
    calls: list[Call] = field(default_factory=list)
    chain: str | None = None
    tuples: bool = False
    aside: Aside | None = None
    closed: bool = False

    def hidden(self) -> Kept:
        """What flows into the first block, of each call."""
        return Kept([call.hidden for call in self.calls], self.aside)

    def keep(self, hidden: Tensor, name: str | None, rest: tuple[tuple[Any, ...], dict[str, Any]], whole: Any) -> None:
        """One more call, of what is copied already. What is the same as in the call before is kept once."""
        if self.calls:
            before = self.calls[-1]
            rest = _shared(rest, (before.args, before.kwargs))
        put = hidden if self.aside is None else self.aside.put(hidden)
        self.calls.append(Call(put, name, *rest, whole))


def block_inputs_of(model: nn.Module) -> BlockInputs | None:
    """What `stop_at_blocks` has put there."""
    return model.__dict__.get(_MARK)


def stop_at_blocks(model: nn.Module, leaves: dict[Leaf, list[str]]) -> None:
    """Let a prepared model's calls end at its first block, if it has blocks and nothing else needs the whole run."""
    asking = {leaf: paths for leaf, paths in leaves.items() if observers_of(leaf)}
    if not asking or any(not isinstance(o, GramObserver) for leaf in asking for o in observers_of(leaf)):
        return
    if (found := block_paths(model, asking)) is None:
        return
    known = model.__dict__[_MARK] = BlockInputs(found)
    if any(is_streamed(leaf) for leaf in leaves):  # of a model that is not to be in memory, its inputs need not be
        known.aside = Aside()
    inside = [leaf for leaf, paths in asking.items() if any(p.startswith(f"{b}.") for p in paths for b in found)]
    if any(o.unfold is not None for leaf in inside for o in grams(leaf)):
        known.chain = "there are convolutions in its blocks"
    model.__dict__["_inc_forward"] = model.__dict__.get("forward")
    model.__dict__["forward"] = types.MethodType(_forward, model)


def undo(model: nn.Module) -> None:
    """The model's own forward again."""
    if model.__dict__.pop(_MARK, None) is not None:
        own = model.__dict__.pop("_inc_forward")
        model.__dict__.pop("forward")
        if own is not None:
            model.__dict__["forward"] = own


def block_paths(model: nn.Module, asking: dict[Leaf, list[str]]) -> list[str] | None:
    """Paths of the entries of the outermost list that holds most of the layers, None without one of two or more."""
    best: list[str] = []
    most = 0
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList | nn.Sequential) or len(modules) < 2:
            continue
        entries = [f"{name}.{i}" if name else str(i) for i in range(len(modules))]
        inside = [sum(any(p.startswith(f"{entry}.") for p in ps) for ps in asking.values()) for entry in entries]
        kinds = {type(m) for m in modules}
        if len(kinds) == 1 and all(inside) and sum(inside) > most:
            best, most = entries, sum(inside)
    return best or None


# ---------------------------------------------------------------------------------------------------------- the calls
def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    known: BlockInputs = self.__dict__[_MARK]
    own = self.__dict__["_inc_forward"] or types.MethodType(type(self).forward, self)
    if torch.compiler.is_compiling() or known.chain or known.closed:
        return own(*args, **kwargs)
    if known.chain is None:
        _first(self, known, own, args, kwargs)
        if known.chain:
            return own(*args, **kwargs)
    whole = copies((args, kwargs)) if known.wants_tail else None
    block = self.get_submodule(known.paths[0])

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        first, name, rest = _split(args, kwargs)
        if first.is_floating_point() and not bool(first.isfinite().all()):
            nan, inf = int(first.isnan().sum()), int(first.isinf().sum())
            raise CalibrationError(
                f"calibration batch {len(known.calls) + 1}: {nan} NaN and {inf} infinite values of {first.numel()}"
                " reach the first block", module=known.paths[0], hint="check that batch",
            )  # fmt: skip
        known.keep(copies(first), name, copies(without_caches(rest)), whole)
        raise Stop("the inputs of the first block are known")

    hook = block.register_forward_pre_hook(take, with_kwargs=True)
    try:
        own(*args, **kwargs)
    except Stop:
        return NotComputed()
    finally:
        hook.remove()
    raise CalibrationError(
        "a calibration batch did not reach the first block", module=known.paths[0],
        hint="calibrate with calls that run the whole model",
    )  # fmt: skip


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, str | None, tuple[tuple[Any, ...], dict[str, Any]]]:
    """(what flows, the keyword that it is passed by, the rest) of a block's arguments."""
    if args:
        return args[0], None, (args[1:], kwargs)
    name = next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if name is None:
        raise Stop("a block is called without a tensor")
    return kwargs[name], name, ((), {k: v for k, v in kwargs.items() if k != name})


def without_caches(rest: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The rest of the arguments without a cache of keys and values: each replay would add to it."""
    args, kwargs = pytree.tree_map(lambda v: None if _is_cache(v) else v, rest, is_leaf=_is_cache)
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return args, kwargs


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _first(model: nn.Module, known: BlockInputs, own: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Run one batch through the model to see whether its blocks are a chain, and what comes behind them. An output head
    of a language model is the end, and not run: its result is the largest tensor there is."""
    chain = _Chain(known.paths)
    behind: list[nn.Module] = []
    hooks = []

    def note(path: str) -> Any:
        return lambda module, args, kwargs, result: chain.add(path, args, kwargs, result)

    def late(module: nn.Module, args: Any) -> None:
        if chain.at_end:
            behind.append(module)

    def end(module: nn.Module, args: Any) -> None:
        if chain.at_end:
            raise Stop("nothing but the output head is left")

    for path in known.paths:
        hooks.append(model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True))
    for module in model.modules():
        if isinstance(module, Leaf) and observers_of(module):
            hooks.append(module.register_forward_pre_hook(late))
    if isinstance(head := _head(model), nn.Module):
        hooks.append(head.register_forward_pre_hook(end))
    collecting = grams(model)
    for observer in collecting:
        observer.enabled = False
    try:
        own_args, own_kwargs = copies((args, kwargs))  # the call runs again: the model may write to its input
        with torch.no_grad(), contextlib.suppress(Stop):
            own(*own_args, **own_kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for observer in collecting:
            observer.enabled = True
    known.chain = chain.why_not or ("" if chain.at_end else _ORDER)
    known.wants_tail, known.tuples = bool(behind), chain.tuples


_ORDER = "its blocks are not called one after the other, each once"


def _head(model: nn.Module) -> Any:
    """What a model of transformers calls its output head; None if there is none."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except Exception:  # other models have no such method, or one that means something else
        return None


@dataclass
class _Chain:
    """Whether blocks are called in order, each with what the one before it gave and otherwise the same arguments."""

    paths: list[str]
    why_not: str = ""
    tuples: bool = False
    at: int = 0
    given: Any = None  # by the block before
    rest: list[Any] = field(default_factory=list)  # the other arguments of the first block
    name: str | None = None  # the keyword by which the first block gets what flows

    @property
    def at_end(self) -> bool:
        """Whether all blocks have been, and nothing has gone wrong."""
        return not self.why_not and self.at == len(self.paths)

    def add(self, path: str, args: Any, kwargs: Any, result: Any) -> None:
        """A block was called."""
        self.why_not = self.why_not or self._check(path, args, kwargs, result)
        self.tuples = isinstance(result, tuple)
        self.at += 1

    def _check(self, path: str, args: Any, kwargs: Any, result: Any) -> str:
        if self.at >= len(self.paths) or path != self.paths[self.at]:
            return _ORDER
        try:
            first, name, others = _split(args, kwargs)
        except Stop:
            first, name, others = None, None, ((), {})
        given = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(first, Tensor) or not isinstance(given, Tensor) or given.shape != first.shape:
            return f"block {path} does not turn one tensor into another of its shape"
        mine = _leaves(others)
        if self.at == 0:
            self.rest, self.name = mine, name
        elif first is not self.given:
            return f"what comes behind block {self.paths[self.at - 1]} is not what it gives"
        elif (
            name != self.name
            or len(mine) != len(self.rest)
            or not all(_same(a, b) for a, b in zip(mine, self.rest, strict=True))
        ):
            return f"block {path} is called with other arguments than the first"
        self.given = given
        return ""


def _shared(new: Any, old: Any) -> Any:
    """The tree `new` with the tensors of `old` where they are equal: masks and angles are, from call to call."""
    leaves, spec = pytree.tree_flatten(new)
    others, other = pytree.tree_flatten(old)
    if spec != other:
        return new
    pairs = zip(leaves, others, strict=True)
    same = (b if isinstance(a, Tensor) and isinstance(b, Tensor) and _same(a, b) else a for a, b in pairs)
    return pytree.tree_unflatten(list(same), spec)


def _leaves(rest: Any) -> list[Any]:
    return pytree.tree_leaves(rest, is_leaf=_is_cache)


def _same(a: Any, b: Any) -> bool:
    if a is b or (_is_cache(a) and _is_cache(b)):
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)
    try:
        return bool(a == b)
    except Exception:
        return False


def grams(model: nn.Module) -> list[GramObserver]:
    """The gram observers of a model, or of one layer."""
    return [o for o in observers_of(model) if isinstance(o, GramObserver)]
