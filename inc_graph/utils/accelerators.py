"""The accelerator of the machine as an object. Nothing is detected before it is asked for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from inc_graph.errors import ConfigError
from inc_graph.utils.device import DEVICES, detect_device, is_device_available

__all__ = ["Accelerator", "device_synchronize", "get_accelerator", "get_local_rank", "get_world_size"]

F = TypeVar("F", bound=Callable[..., Any])


class Accelerator:
    """One kind of device. On one that this machine does not have, what would wait or free memory does nothing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        """ "hpu", "xpu", "cuda" or "cpu"."""
        return self._name

    def is_available(self) -> bool:
        """Whether this machine has one that can be used."""
        return is_device_available(self._name)

    def _module(self) -> Any:
        """torch's module for the device; None for the CPU, and for one that is not there."""
        return getattr(torch, self._name) if self._name != "cpu" and self.is_available() else None

    def device_name(self, device_indx: int | None = None) -> str:
        """ "cuda:1" for 1, "cuda" for None; "cpu" is one device."""
        return self._name if device_indx is None or self._name == "cpu" else f"{self._name}:{device_indx}"

    def set_device(self, device_index: int) -> None:
        """Make a device the current one of its kind."""
        if (module := self._module()) is not None:
            module.set_device(device_index)

    def current_device(self) -> int | str:
        """Index of the current device; "cpu" of the CPU."""
        module = self._module()
        return self._name if module is None else int(module.current_device())

    def current_device_name(self) -> str:
        """Name and index of the current device ("cuda:0")."""
        current = self.current_device()
        return current if isinstance(current, str) else self.device_name(current)

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """A context in which a device is the current one."""
        module = self._module()
        return nullcontext() if module is None or device_index is None else module.device(device_index)

    def empty_cache(self) -> None:
        """Give memory that is held and not used back to the device."""
        if (free := getattr(self._module(), "empty_cache", None)) is not None:
            free()

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if (module := self._module()) is not None:
            module.synchronize()

    def mark_step(self) -> None:
        """Start what Gaudi has collected so far; elsewhere nothing is collected."""
        if self._name == "hpu" and self.is_available():
            import habana_frameworks.torch.core as core

            core.mark_step()

    def __repr__(self) -> str:
        return f"Accelerator({self._name!r})"


def get_accelerator(device_name: str = "auto") -> Accelerator:
    """The device named, or for "auto" the best one present: hpu, xpu, cuda, cpu. `INC_TARGET_DEVICE` overrides both.

    Raises:
        ConfigError: the name, or that in `INC_TARGET_DEVICE`, is not a device; or this machine has no such device (one
            that `INC_TARGET_DEVICE` asks for need not be there).
    """
    wanted = str(device_name).strip().lower()
    if wanted == "auto" or os.environ.get("INC_TARGET_DEVICE", "").strip():
        return Accelerator(detect_device())
    if wanted not in DEVICES:
        raise ConfigError(f"{device_name!r} is not a device", hint=f"'auto', or one of {', '.join(DEVICES)}")
    if not is_device_available(wanted):
        raise ConfigError(f"this machine has no {wanted} device that torch can use", hint="'auto' takes what there is")
    return Accelerator(wanted)


def device_synchronize(raw_func: F) -> F:
    """Decorator: wait for the accelerator before and after a call, so that its time is all of the call's."""

    @functools.wraps(raw_func)
    def synchronized(*args: Any, **kwargs: Any) -> Any:
        accelerator = get_accelerator()
        accelerator.synchronize()
        output = raw_func(*args, **kwargs)
        accelerator.synchronize()
        return output

    return synchronized  # type: ignore[return-value]


def get_world_size() -> int:
    """Processes of this run: torch.distributed's number, else `WORLD_SIZE`, else -1."""
    return torch.distributed.get_world_size() if _distributed() else _from_environment("WORLD_SIZE")


def get_local_rank() -> int:
    """Number of this process: torch.distributed's rank, else `LOCAL_RANK`, else -1."""
    return torch.distributed.get_rank() if _distributed() else _from_environment("LOCAL_RANK")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _from_environment(name: str) -> int:
    text = os.environ.get(name, "").strip() or "-1"
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a whole number") from None
