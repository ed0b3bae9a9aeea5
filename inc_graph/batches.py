"""A calibration batch counts whole or not at all.

All observers of a prepared model share one `Batch`. It opens when the model is called and closes when the call returns;
if the call fails, because an observer refuses a NaN or for any other reason, what the observers took in since then is
taken back. A snapshot costs nothing: states are never changed in place.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import fx, nn

__all__ = ["Batch", "Collector", "no_batches", "one_batch_a_call"]


class Collector(Protocol):
    """What takes part: `snapshot()` gives what `restore()` puts back."""

    batch: Batch | None

    def snapshot(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Batch:
    """What the observers of one model knew when the call that is running began.

    Attributes:
        open: A call is running.
        calls: That went well before.
    """

    def __init__(self) -> None:
        self.open, self.calls = False, 0
        self._before: dict[int, tuple[Collector, Any]] = {}

    def note(self, collector: Collector) -> None:
        """To be called before `collector` takes something in."""
        if self.open:
            self._before.setdefault(id(collector), (collector, collector.snapshot()))

    def begin(self) -> None:
        """The model is called. A call that never ended was interrupted: it does not count either."""
        if self.open:
            self.end(False)
        self.open = True

    def end(self, good: bool) -> None:
        """The call is over."""
        before, self._before, self.open = self._before, {}, False
        if not good:
            for collector, state in before.values():
                collector.restore(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Batch:
        new = memo[id(self)] = Batch()  # a copy is not in the middle of a call
        new.calls = self.calls
        return new


def one_batch_a_call(model: nn.Module) -> None:
    """Let each call of a prepared model be one batch for its observers."""
    batch = Batch()
    for collector in _collectors(model):
        collector.batch = batch
    _install(model)
    if isinstance(model, fx.GraphModule):
        model._register_deepcopy_hook(_install)  # fx copies its own hooks only


def no_batches(model: nn.Module) -> None:
    """Take back what `one_batch_a_call` has done to the calls of the model."""
    for table in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in table.items() if hook in (_begin, _end, _fail)]:
            del table[key]
            model._forward_hooks_always_called.pop(key, None)
    hooks = getattr(model, "_deepcopy_hooks", [])
    if _install in hooks:
        hooks.remove(_install)


def _collectors(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "batch") and hasattr(m, "snapshot")]


def _batch_of(model: nn.Module) -> Batch | None:
    """Found anew each time: a copied model has copied observers, and their batch."""
    found = (getattr(m, "batch", None) for m in model.modules())
    return next((b for b in found if isinstance(b, Batch)), None)


def _install(model: nn.Module) -> None:
    model.register_forward_pre_hook(_begin)
    model.register_forward_hook(_end)
    model.register_forward_hook(_fail, always_call=True)


def _begin(model: nn.Module, args: Any) -> None:
    if (batch := _batch_of(model)) is not None:
        batch.begin()


def _end(model: nn.Module, args: Any, result: Any) -> None:
    """Runs after a call that went well, and before `_fail`."""
    if (batch := _batch_of(model)) is not None:
        batch.end(True)
        batch.calls += 1


def _fail(model: nn.Module, args: Any, result: Any) -> None:
    """Runs after every call; one that went well is over by now."""
    if (batch := _batch_of(model)) is not None and batch.open:
        batch.end(False)
