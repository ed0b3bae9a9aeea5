"""What a prepared model gives while it is calibrated: there is no output, as the call ended early."""

from __future__ import annotations

from typing import Any

from torch import nn

from inc_graph.errors import CalibrationError

__all__ = ["NotComputed", "leave_alone"]


class NotComputed:
    """In the place of an output. What reads it fails and says why: operators, functions of torch and numpy, text."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise CalibrationError(
            "this output was not computed: calibration stops as soon as it has the inputs that it needs",
            hint="run calibration data as prepared(batch) and leave the result alone; evaluate the model after convert",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls()._refuse()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse()

    def __format__(self, form: str) -> str:
        return repr(self) if not form else str(self._refuse())

    def __repr__(self) -> str:
        return "<not computed: calibration stops at the inputs that it needs>"

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._refuse())

    def __hash__(self) -> int:
        return id(self)

    __getitem__ = __setitem__ = __iter__ = __len__ = __contains__ = _refuse
    __bool__ = __float__ = __int__ = __index__ = __complex__ = __round__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = __rmatmul__ = _refuse
    __and__ = __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = _refuse


def leave_alone(model: nn.Module) -> None:
    """To be called in the forward of a model that gives no output: its hooks that would read one are not called this
    time. Those of this package are."""
    hooks = model._forward_hooks
    everyone = list(hooks.items())
    for key, hook in everyone:
        if not str(getattr(hook, "__module__", "")).startswith("inc_graph."):
            del hooks[key]
    if len(hooks) == len(everyone):
        return

    def put_back(module: nn.Module, args: Any, result: Any) -> None:
        handle.remove()
        hooks.clear()
        hooks.update(everyone)

    handle = model.register_forward_hook(put_back, always_call=True)
