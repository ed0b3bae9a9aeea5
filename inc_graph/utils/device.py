"""Which accelerator and which backend: detected, `INC_TARGET_DEVICE` overrides, an argument overrides both."""

from __future__ import annotations

import os
import sys

import torch

from inc_graph.errors import ConfigError

__all__ = ["DEVICES", "choose_backend", "detect_device", "is_ipex_imported"]

DEVICES = ("hpu", "xpu", "cuda", "cpu")
_BACKENDS = {"cpu": "inductor", "cuda": "cuda", "hpu": "hpu", "xpu": "inductor"}


def is_ipex_imported() -> bool:
    """Whether the program has imported intel_extension_for_pytorch."""
    return "intel_extension_for_pytorch" in sys.modules


def detect_device() -> str:
    """The best accelerator present: hpu, xpu, cuda or cpu; `INC_TARGET_DEVICE` decides instead if set.

    Raises:
        ConfigError: if `INC_TARGET_DEVICE` names no known device.
    """
    wanted = os.environ.get("INC_TARGET_DEVICE", "").strip().lower()
    if wanted:
        if wanted not in DEVICES:
            raise ConfigError(f"INC_TARGET_DEVICE={wanted!r} is not a device", hint=f"one of {', '.join(DEVICES)}")
        return wanted
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
    from inc_graph.registry import BACKENDS

    if backend != "auto":
        from inc_graph.errors import LoweringError

        reason = BACKENDS.get(backend).available()
        if reason is not None:
            raise LoweringError(f"backend '{backend}' is not available: {reason}", hint="backend='eager' always is")
        return backend, ""
    device = device or detect_device()
    wanted = "ipex" if device in ("cpu", "xpu") and is_ipex_imported() and "ipex" in BACKENDS else _BACKENDS[device]
    if wanted not in BACKENDS:
        fallback = "inductor" if device == "cpu" else "eager"
        return fallback, f"no backend for {device} in this version; using '{fallback}'"
    reason = BACKENDS.get(wanted).available()
    return (wanted, "") if reason is None else ("eager", f"backend '{wanted}' is not available: {reason}; using 'eager'")
