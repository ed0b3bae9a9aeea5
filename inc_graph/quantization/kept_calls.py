"""Calls of a prepared graph keep their arguments: its layers see them when it is converted.

A layer is best calibrated on what the rounded layers before it give (Frantar et al. 2022, section 4), and that is not
known before these are rounded. So a call only keeps its arguments, and computes nothing unless something else observes.
`graph_in_sequence` does the rest. The calls ride in the `meta` of the graph, so that its copies have them too; copies
share the tensors, which nobody writes to.

Arguments that hold too much are put into a temporary file. Where there is no room for them, or calls cannot be computed
side by side, layers see their inputs in the float model, as the data runs; the report says why.

A graph that is smoothed keeps its calls as well, and computes them too: channel observers watch now, and the calls run
once more through the smoothed graph. Of calls that hold too much the first are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from inc_graph.aside import Aside, Kept, Waiting
from inc_graph.channel_stats import ChannelObserver
from inc_graph.errors import CalibrationError, IncError, IncWarning
from inc_graph.gram import GramObserver
from inc_graph.graph import get_attr
from inc_graph.side_by_side import why_not

__all__ = ["LIMIT", "KeptCalls", "flat_inputs", "forget_calls", "keep_calls", "kept_calls", "run_kept"]

_MARK = "inc_kept_calls"

LIMIT = 2 << 30
"""Bytes that the arguments of all calls may hold in memory; and what they compute, where they wait for each other."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


class KeptCalls:
    """Arguments of the calls, in their order.

    Args:
        instead: Makes what a call gives that computes nothing; None: calls compute.
        reason: Why layers see their inputs in the float model after all; no calls are kept then.
        again: The calls are kept to be run once more; all observers look at them now, too.

    Attributes:
        aside: Where the calls are; None: in memory.
        bytes: Of all these tensors.
        left_out: Calls that were not kept, since those before them hold too much. Only with `again`.
    """

    def __init__(self, instead: Callable[[], Any] | None, reason: str, again: bool = False) -> None:
        self.instead, self.reason, self.again = instead, reason, again
        self.left_out = 0
        self.calls: list[Call | Waiting] = []
        self.aside: Aside | None = None
        self.bytes = 0

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One more call."""
        call = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
        self.bytes += _nbytes(call)
        self.calls.append(call)

    def each(self) -> Iterator[Call]:
        """The calls. Their tensors are copies: whoever calls may use the memory again."""
        return iter(Kept(self.calls, None))

    def put_aside(self) -> str:
        """Put the calls that are in memory into a file. "", or why that is not possible."""
        aside = Aside() if self.aside is None else self.aside
        try:
            self.calls = [call if isinstance(call, Waiting) else aside.put(call) for call in self.calls]
        except IncError as e:
            return e.message
        self.aside = aside
        return ""

    def take_back(self) -> None:
        """The last call does not count."""
        self.bytes -= _nbytes(Kept(self.calls, None)[-1])
        self.calls.pop()

    def __copy__(self) -> KeptCalls:
        new = KeptCalls(self.instead, self.reason, self.again)
        new.calls, new.bytes, new.left_out = list(self.calls), self.bytes, self.left_out
        new.aside = self.aside
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptCalls:
        return self.__copy__()


def _nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def keep_calls(gm: fx.GraphModule, instead: Callable[[], Any]) -> None:
    """Let the calls of a prepared graph be kept, if one of its layers needs its inputs. `instead`: see `KeptCalls`."""
    grams = _grams(gm)
    if any(isinstance(m, ChannelObserver) for m in gm.modules()):
        kept = gm.meta[_MARK] = KeptCalls(None, "", again=True)
    elif grams:
        observing = {get_attr(gm, str(n.target)) for n in gm.graph.find_nodes(op="call_module")}
        kept = gm.meta[_MARK] = KeptCalls(instead if observing <= set(grams) else None, why_not(gm))
    else:
        return
    if not kept.reason:
        _install(gm)
        gm._register_deepcopy_hook(_install)  # the code of a deep copy is generated anew


def kept_calls(model: nn.Module) -> KeptCalls | None:
    """What a prepared graph keeps; None for other modules, and where no layer needs its inputs."""
    found: KeptCalls | None = model.meta.get(_MARK) if isinstance(model, fx.GraphModule) else None
    return found


def forget_calls(gm: fx.GraphModule) -> None:
    """Take back what `keep_calls` has done."""
    gm.meta.pop(_MARK, None)
    hooks = getattr(gm, "_deepcopy_hooks", [])
    if _install in hooks:
        hooks.remove(_install)


def run_kept(gm: fx.GraphModule, kept: KeptCalls) -> None:
    """Run kept calls through the float graph, where gram observers see them; `gm` keeps none."""
    grams = _grams(gm)
    before = [o.enabled for o in grams]
    try:
        for observer in grams:
            observer.enabled = True
        with torch.no_grad():
            for args, kwargs in kept.each():
                type(gm).forward(gm, *args, **kwargs)  # without the hooks: nothing is checked again
    finally:
        for observer, enabled in zip(grams, before, strict=True):
            observer.enabled = enabled


def flat_inputs(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The value of each placeholder in a call that `forward` takes."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None:
        return list(args)
    given = {**dict(zip(info.orig_args, args, strict=False)), **kwargs}
    values: Iterator[Any] = iter([given[name] for name in info.orig_args])
    spec = info.in_spec
    form = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    if isinstance(form, tuple) and len(form) == 2 and isinstance(form[0], tuple) and isinstance(form[1], dict):
        tree: Any = ([next(values) for _ in form[0]], {key: next(values) for key in form[1]})
    else:
        tree = list(values)
    found: list[Any] = fx_pytree.tree_flatten_spec(tree, spec)
    return found


def _grams(gm: nn.Module) -> list[GramObserver]:
    return [m for m in gm.modules() if isinstance(m, GramObserver)]


# ---------------------------------------------------------------------------------------------------------- the calls
def _install(gm: fx.GraphModule) -> None:
    """Have the class of this graph (each graph has its own) ask what is to be done with a call. Clones share it."""
    own = type(gm).forward

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or (kept := kept_calls(self)) is None or kept.reason:
            return own(self, *args, **kwargs)
        return _called(self, kept, own, args, kwargs)

    type(gm).forward = forward


def _called(
    gm: fx.GraphModule, kept: KeptCalls, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    kinds = ChannelObserver if kept.again else GramObserver
    watching = [m for m in gm.modules() if isinstance(m, kinds) and m.enabled]
    names = list(gm.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]
    if not watching or sorted([*names[: len(args)], *kwargs]) != sorted(names) or len(args) > len(names):
        return own(gm, *args, **kwargs)  # which says what is wrong with the arguments
    for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
        for x in pytree.tree_leaves(value):
            if isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()):
                number = len(kept.calls) + kept.left_out + 1
                text = f"calibration call {number}: input {name!r}, of shape {list(x.shape)}, holds NaN"
                raise CalibrationError(text, hint="check that batch")
    kept.add(args, kwargs)
    try:
        if kept.bytes > LIMIT and kept.again:
            _no_more(kept)
        elif kept.bytes > LIMIT and (why := kept.put_aside()):
            _give_up(gm, kept, why)
        if kept.again:
            return own(gm, *args, **kwargs)
        if kept.instead is not None:
            return kept.instead()
        for observer in watching:
            observer.enabled = False
        return own(gm, *args, **kwargs)
    except BaseException:  # a call counts whole or not at all
        if kept.calls and not kept.left_out:
            kept.take_back()
        raise
    finally:
        for observer in watching:
            observer.enabled = True


def _no_more(kept: KeptCalls) -> None:
    """The last call is not kept, as those before it hold what is allowed."""
    kept.take_back()
    kept.left_out += 1
    if kept.left_out == 1:
        text = f"ranges behind smoothed inputs will be those of the first {len(kept.calls)} calibration calls"
        why = f"their arguments take {kept.bytes / 2**30:.1f} GiB, and {LIMIT / 2**30:.1f} GiB are kept"
        warnings.warn(f"{text}: {why}", IncWarning, stacklevel=7)


def _give_up(gm: fx.GraphModule, kept: KeptCalls, why: str) -> None:
    """Run what is kept through the float graph; what will come runs through it at once."""
    del gm.meta[_MARK]
    try:
        run_kept(gm, kept)
    finally:
        gm.meta[_MARK] = kept
    size = f"{kept.bytes / 2**30:.1f} GiB"
    kept.calls, kept.bytes, kept.aside = [], 0, None
    kept.reason = f"the arguments of its calls take {size}, and {LIMIT / 2**30:.1f} GiB are kept in memory; {why}"
    text = "layers will be rounded on their inputs in the float model, not on what the rounded ones before them give"
    warnings.warn(f"{text}: {kept.reason}", IncWarning, stacklevel=7)
