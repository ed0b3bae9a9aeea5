"""Which accelerator and which backend: detected, `INC_TARGET_DEVICE` overrides, an argument overrides both."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

from inc_graph.errors import ConfigError, LoweringError
from inc_graph.registry import BACKENDS

__all__ = ["DEVICES", "choose_backend", "detect_device", "is_ipex_imported"]

DEVICES = ("hpu", "xpu", "cuda", "cpu")
_BACKENDS = {"cpu": "inductor", "cuda": "cuda", "hpu": "hpu", "xpu": "inductor"}


def is_ipex_imported() -> bool:
    """Whether the program has imported intel_extension_for_pytorch."""
    return "intel_extension_for_pytorch" in sys.modules


def detect_device(model: nn.Module | None = None) -> str:
    """The device that decides on a backend: where the tensors of `model` are, or the best accelerator present.

    `INC_TARGET_DEVICE` decides instead if it is set.

    Raises:
        ConfigError: if `INC_TARGET_DEVICE` names no known device.
    """
    wanted = os.environ.get("INC_TARGET_DEVICE", "").strip().lower()
    if wanted:
        if wanted not in DEVICES:
            raise ConfigError(f"INC_TARGET_DEVICE={wanted!r} is not a device", hint=f"one of {', '.join(DEVICES)}")
        return wanted
    if model is not None:
        tensor = next(iter([*model.parameters(), *model.buffers()]), None)
        if tensor is not None:
            return tensor.device.type
    for name in DEVICES[:-1]:
        module = getattr(torch, name, None)
        if module is not None and getattr(module, "is_available", lambda: False)():
            return name
    return "cpu"


def choose_backend(backend: str = "auto", device: str | None = None) -> tuple[str, str]:
    """(backend, note). "auto" takes the device's own backend if it can run here, else the reference, and says so.

    Raises:
        UnknownNameError: if an explicit backend does not exist.
        LoweringError: if an explicit backend cannot run here.
    """
    if backend != "auto":
        reason = BACKENDS.get(backend).available()
        if reason is not None:
            raise LoweringError(f"backend '{backend}' is not available: {reason}", hint="backend='eager' always is")
        return backend, ""
    device = device or detect_device()
    wanted = _BACKENDS.get(device, "")
    if device in ("cpu", "xpu") and is_ipex_imported() and "ipex" in BACKENDS:
        wanted = "ipex"
    if wanted not in BACKENDS:
        return "eager", f"no backend for {device} in this version; using 'eager'"
    reason = BACKENDS.get(wanted).available()
    return (
        (wanted, "") if reason is None else ("eager", f"backend '{wanted}' is not available: {reason}; using 'eager'")
    )
