"""Calibration that stops at the first block of a model: the rest is computed block by block when it is converted.

A model of repeated blocks (the decoder layers of a language model) is quantized one block after the other, and each is
calibrated on what the quantized blocks before it give (Frantar et al. 2022, section 4). So while the user's data runs,
only the inputs of the first block are wanted. They are kept, and the call ends there.

That is right if the blocks are a chain, which `chain` looks at in each call. Where they are none, calibration goes on
over the whole model, and each layer is rounded on its own inputs in the float model; calls that were kept until then
run once more for that. The report says which call it was, and why.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inc_graph.aside import Aside, Waiting
from inc_graph.gram import GramObserver
from inc_graph.quantization.chain import Chain, Reads, copies, same, without_caches
from inc_graph.quantization.finish import observers_of
from inc_graph.quantization.hidden_runs import Buffers, no_fakes_left, unseen
from inc_graph.quantization.layers import leaves
from inc_graph.quantization.leaf import Leaf
from inc_graph.quantization.not_computed import NotComputed, leave_alone
from inc_graph.quantization.streaming import is_streamed
from inc_graph.quantization.without_values import Form, Stop, without_head, without_values

__all__ = [
    "BlockInputs", "Call", "NotComputed", "Stop", "block_inputs_of", "block_paths", "copies", "grams",
    "not_watching", "own_forward", "stop_at_blocks", "undo", "without_caches",
]  # fmt: skip

_MARK = "_inc_block_inputs"
_ENTRY = "_inc_entry"  # of a module that holds all blocks: (the model, its path)
_OWN = "_inc_forward"  # of such a module: the forward in its __dict__, or None
_ONE_AT_A_TIME = threading.RLock()  # a call changes what the blocks do


@dataclass
class Call:
    """Arguments of one call of a block, as copies: whoever calls may use the memory again.

    Attributes:
        hidden: What flows from block to block; it may wait in a file.
        name: The keyword that it is passed by; None: it is the first argument.
        args, kwargs: The others.
        whole: (args, kwargs) of the model's call; they may wait in a file.
        entry: Path of the module that was called: the model, "", or one in it that holds all of its blocks.
    """

    hidden: Tensor | Waiting
    name: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    whole: Any
    entry: str = ""

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """What a block makes of `hidden`. It gets copies, so it may write to what it is given."""
        args, kwargs = copies((self.args, self.kwargs))
        if self.name is None:
            return block(hidden.clone(), *args, **kwargs)
        return block(*args, **{self.name: hidden.clone()}, **kwargs)

    def again(self, model: nn.Module, known: BlockInputs) -> Any:
        """What the model's call gives, by its own forward."""
        args, kwargs = self.whole.get() if isinstance(self.whole, Waiting) else copies(self.whole)
        with known.runs():
            return own_forward(model.get_submodule(self.entry))(*args, **kwargs)


@dataclass
class BlockInputs:
    """What is known of a model's blocks, and the calls that calibration has left.

    Attributes:
        paths: Of the blocks, in the order in which they run.
        before: Paths of the layers that are called before the blocks.
        behind: Of those that are called after the first of them, outside of blocks, and have to see their inputs.
        calls: One for each call of the model.
        reads_all: What stands behind the blocks may read what each of them gives.
        chain: None until the first batch was seen; then "" or the reason why the blocks are none.
        forms: What each block gives.
        aside: Where what flows from block to block waits; None: in memory.
        closed: Calibration is over: calls run the whole model, and are not kept.
        running: The threads in which a call runs.
    """

    paths: list[str]
    before: set[str] = field(default_factory=set)
    behind: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    chain: str | None = None
    reads_all: bool = False
    forms: list[Form] = field(default_factory=list)
    aside: Aside | None = None
    closed: bool = False
    running: set[int] = field(default_factory=set)

    @contextlib.contextmanager
    def runs(self) -> Iterator[None]:
        """Within, what is called in the model is a part of the call that runs, and no call of its own."""
        me = threading.get_ident()
        outermost = me not in self.running
        self.running.add(me)
        try:
            yield
        finally:
            if outermost:
                self.running.discard(me)

    @property
    def wants_tail(self) -> bool:
        """Whether a layer behind the blocks has to see its inputs too."""
        return bool(self.behind)

    def holds(self, paths: Iterable[str]) -> bool:
        """Whether a layer that stands at these paths is one of a block."""
        return any(path.startswith(f"{block}.") for path in paths for block in self.paths)

    def keep(
        self, hidden: Any, name: str | None, rest: tuple[tuple[Any, ...], dict[str, Any]], whole: Any, entry: str
    ) -> None:
        """One more call, of what is copied already. What is the same as in the call before is kept once."""
        if self.calls:
            before = self.calls[-1]
            rest = _shared(rest, (before.args, before.kwargs))
        if self.aside is not None:
            hidden = self.aside.put(hidden)
            whole = whole if isinstance(whole, Waiting) else self.aside.put(whole)
        self.calls.append(Call(hidden, name, *rest, whole, entry))


def block_inputs_of(model: nn.Module) -> BlockInputs | None:
    """What `stop_at_blocks` has put there."""
    return model.__dict__.get(_MARK)


def stop_at_blocks(model: nn.Module, places: dict[Leaf, list[str]]) -> None:
    """Let a prepared model's calls end at its first block, if it has blocks and nothing else needs the whole run."""
    asking = {leaf: paths for leaf, paths in places.items() if observers_of(leaf)}
    if not asking or any(not isinstance(o, GramObserver) for leaf in asking for o in observers_of(leaf)):
        return
    if (found := block_paths(model, asking)) is None:
        return
    known = model.__dict__[_MARK] = BlockInputs(found)
    if any(is_streamed(leaf) for leaf in places):  # of a model that is not to be in memory, its inputs need not be
        known.aside = Aside()
    inside = [leaf for leaf, paths in asking.items() if known.holds(paths)]
    if any(o.unfold is not None for leaf in inside for o in grams(leaf)):
        known.chain = "there are convolutions in its blocks"
    shared = [leaf for leaf in inside if len({next((b for b in found if p.startswith(f"{b}.")), "")
                                              for p in asking[leaf]}) > 1]  # fmt: skip
    if shared:
        known.chain = f"layer {shared[0].path} does not belong to one block alone: it is also {asking[shared[0]][1]}"
    for path in _entries(model, found):
        module = model.get_submodule(path)
        module.__dict__[_ENTRY] = model, path
        module.__dict__[_OWN] = module.__dict__.get("forward")
        module.__dict__["forward"] = types.MethodType(_forward, module)


def undo(model: nn.Module) -> None:
    """The own forward of the model again, and of what is in it."""
    model.__dict__.pop(_MARK, None)
    for module in model.modules():
        if module.__dict__.pop(_ENTRY, None) is not None:
            own = module.__dict__.pop(_OWN)
            module.__dict__.pop("forward")
            if own is not None:
                module.__dict__["forward"] = own


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that a module has without this."""
    own: Callable[..., Any] = module.__dict__[_OWN] or types.MethodType(type(module).forward, module)
    return own


def _entries(model: nn.Module, blocks: list[str]) -> list[str]:
    """Paths of the model and of the modules in it that hold all blocks and can be called."""
    parts = blocks[0].split(".")[:-1]
    paths = [".".join(parts[:i]) for i in range(len(parts) + 1)]
    return [path for path in paths if not path or not isinstance(model.get_submodule(path), nn.ModuleList)]


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
    own = own_forward(self)
    if torch.compiler.is_compiling():
        return own(*args, **kwargs)
    model, entry = self.__dict__[_ENTRY]
    known: BlockInputs = model.__dict__[_MARK]
    if known.chain or known.closed or threading.get_ident() in known.running:
        return own(*args, **kwargs)
    with _ONE_AT_A_TIME, known.runs():
        if not _kept(model, self, known, entry, args, kwargs):
            return own(*args, **kwargs)
        if not entry:
            leave_alone(self)
            return NotComputed()
        with not_watching(model):  # whoever calls a part of a model may want what it gives
            return own(*args, **kwargs)


def _kept(model: nn.Module, module: nn.Module, known: BlockInputs, entry: str, args: Any, kwargs: Any) -> bool:
    """Keep a call of a module that holds all blocks. False if they are no chain in it, as `known.chain` says then."""
    with torch.inference_mode(False), torch.no_grad():
        whole = copies((args, kwargs))
        chain = _chain(model, known, module, whole)
        why_not = chain.failed
        if why_not and known.chain is not None:
            why_not = f"in calibration batch {chain.batch}, {why_not}"
        if why_not:
            if known.calls:
                _in_float(model, known)
            known.chain = why_not
            return False
        assert chain.first is not None
        if known.chain is None:
            known.forms = chain.forms
        known.chain = ""
        known.before |= chain.before
        known.behind |= chain.behind
        known.reads_all |= chain.reads_all
        known.keep(*chain.first, whole, entry)
        return True


@contextlib.contextmanager
def not_watching(model: nn.Module) -> Iterator[None]:
    """Within, layers do not take in what they see."""
    collecting = [(o, o.enabled) for o in grams(model)]
    try:
        for observer, _ in collecting:
            observer.enabled = False
        yield
    finally:
        for observer, enabled in collecting:
            observer.enabled = enabled


def _chain(model: nn.Module, known: BlockInputs, module: nn.Module, whole: Any) -> Chain:
    """Run one call, and see whether the blocks are a chain in it. Layers before the blocks take in what they see, and
    buffers are written to, once, as the user's call does it; nothing of a call that is no chain is left."""
    before = Buffers(model)
    collecting = grams(model)
    states = [(o, o.snapshot()) for o in collecting]

    def back() -> None:
        before.restore()
        for observer, state in states:
            observer.restore(state)

    try:
        if known.forms:
            chain = Chain(known.paths, len(known.calls) + 1)
            blocks = {i: model.get_submodule(path) for i, path in enumerate(known.paths)}
            try:
                with without_values(blocks, known.forms, chain):
                    _run(model, known, module, whole, chain, collecting)
                if not chain.unsure:
                    if chain.failed:
                        back()
                    return chain
            except Exception:  # what it is about is said by a call that computes
                if chain.fault is not None:
                    raise chain.fault from None
            back()
        chain = Chain(known.paths, len(known.calls) + 1, reads_all=bool(known.forms))
        _run(model, known, module, whole, chain, collecting)
        chain.reads_all |= any(any(form.more) for form in chain.forms)
    except BaseException:
        back()
        raise
    if chain.failed:
        back()
    return chain


def _run(model: nn.Module, known: BlockInputs, module: nn.Module, whole: Any, chain: Chain, collecting: Any) -> None:
    """Let a chain see a call of a module. An output head of a language model is not run: its result is the largest
    tensor there is, and nobody asks for it. So what follows it may fail."""
    hooks = []

    def enter(i: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            for observer in collecting:  # what is behind sees its inputs when the blocks are rounded
                observer.enabled = False
            chain.enter(i, args, kwargs)

        return hook

    def leave(i: int) -> Any:
        return lambda module, args, result: chain.leave(i, result)

    def layer(block: bool, collects: bool) -> Any:
        def hook(module: Any, args: Any) -> None:
            if collects:
                chain.called(module, block)
            if not block:
                chain.note(module, collects)

        return hook

    for i, path in enumerate(known.paths):
        block = model.get_submodule(path)
        hooks.append(block.register_forward_pre_hook(enter(i), with_kwargs=True, prepend=True))
        hooks.append(block.register_forward_hook(leave(i)))
    for leaf, paths in leaves(model).items():
        hooks.append(leaf.register_forward_pre_hook(layer(known.holds(paths), bool(grams(leaf)))))
    try:
        args, kwargs = copies(whole)  # the model may write to what it is given
        with contextlib.suppress(Stop), without_head(_head(module), chain), no_fakes_left(model), Reads(chain):
            own_forward(module)(*args, **kwargs)
    except Exception:
        if not chain.at_head:
            raise
    finally:
        for hook in hooks:
            hook.remove()
        for observer in collecting:
            observer.enabled = True
    both = (known.before | chain.before) & (known.behind | chain.behind)
    if both and not chain.failed:
        chain.why_not = f"layer {min(both)} is called before the blocks and behind them"


def _in_float(model: nn.Module, known: BlockInputs) -> None:
    """All calls that were kept run through the whole float model, where all layers take in what they see."""
    collecting = grams(model)
    states = [(o, o.snapshot()) for o in collecting]
    try:
        for observer in collecting:
            observer.reset()
        with unseen(model):
            for call in known.calls:
                call.again(model, known)
    except BaseException:
        for observer, state in states:
            observer.restore(state)
        raise
    known.calls = []
    for batch in {id(o.batch): o.batch for o in collecting if o.batch is not None and o.batch.open}.values():
        batch.end(True)  # if the call that is running fails, those before it count
        batch.begin()


def _head(model: nn.Module) -> Any:
    """What a model of transformers calls its output head; None if there is none."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except Exception:  # other models have no such method, or one that means something else
        return None


def _shared(new: Any, old: Any) -> Any:
    """The tree `new` with the tensors of `old` where they are equal: masks and angles are, from call to call."""
    leaves, spec = pytree.tree_flatten(new)
    others, other = pytree.tree_flatten(old)
    if spec != other:
        return new
    pairs = zip(leaves, others, strict=True)
    equal = (b if isinstance(a, Tensor) and isinstance(b, Tensor) and same(a, b) else a for a, b in pairs)
    return pytree.tree_unflatten(list(equal), spec)


def grams(model: nn.Module) -> list[GramObserver]:
    """The gram observers of a model, or of one layer."""
    return [o for o in observers_of(model) if isinstance(o, GramObserver)]
