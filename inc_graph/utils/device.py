"""Which accelerator and which backend: detected, `INC_TARGET_DEVICE` overrides, an argument overrides both."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

from inc_graph.errors import ConfigError, LoweringError
from inc_graph.registry import BACKENDS

__all__ = ["DEVICES", "choose_backend", "detect_device", "is_device_available", "is_ipex_imported"]

DEVICES = ("hpu", "xpu", "cuda", "cpu")
_BACKENDS = {"cpu": "inductor", "cuda": "cuda", "hpu": "hpu", "xpu": "inductor"}


def is_ipex_imported() -> bool:
    """Whether the program has imported intel_extension_for_pytorch."""
    return "intel_extension_for_pytorch" in sys.modules


def is_device_available(name: str) -> bool:
    """Whether torch can use a device of this kind here."""
    return name == "cpu" or bool(getattr(getattr(torch, name, None), "is_available", lambda: False)())


def detect_device(device: nn.Module | torch.device | str | int | None = None) -> str:
    """The device to work on.

    Args:
        device: None or "auto": the best accelerator present. A number, also as text: that one of its kind, the CPU
            where there is no accelerator. A model: where its tensors are. A device or its name ("cuda:1"): that one.
            `INC_TARGET_DEVICE` decides instead in all cases but the last.

    Raises:
        ConfigError: `INC_TARGET_DEVICE`, or the name given, names no device.
    """
    if isinstance(device, torch.device) or (isinstance(device, str) and device != "auto" and not device.isdecimal()):
        try:
            return str(torch.device(device))
        except RuntimeError:
            raise ConfigError(f"{device!r} is not a device", hint="for example 'cuda:0', 'cpu' or 'auto'") from None
    if device is not None and not isinstance(device, nn.Module | str | int):
        raise ConfigError(f"{device!r} is not a device", hint="for example 'cuda:0', 'cpu' or 'auto'")
    kind = _kind(device if isinstance(device, nn.Module) else None)
    if device is None or device == "auto" or isinstance(device, nn.Module) or kind == "cpu":
        return kind
    return f"{kind}:{int(device)}"


def _kind(model: nn.Module | None) -> str:
    wanted = os.environ.get("INC_TARGET_DEVICE", "").strip().lower()
    if wanted:
        if wanted not in DEVICES:
            raise ConfigError(f"INC_TARGET_DEVICE={wanted!r} is not a device", hint=f"one of {', '.join(DEVICES)}")
        return wanted
    if model is not None:
        tensor = next(iter([*model.parameters(), *model.buffers()]), None)
        if tensor is not None:
            return tensor.device.type
    return next(name for name in DEVICES if is_device_available(name))


def choose_backend(backend: str = "auto", device: str | None = None) -> tuple[str, str]:
    """(backend, note). "auto" takes "ipex" on a CPU if the program has imported IPEX, else the device's own backend;
    what cannot run here is passed over, down to the reference, and the note says so.

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
    wanted = [name for name in (_BACKENDS.get(device, ""), "eager") if name in BACKENDS]
    if device in ("cpu", "xpu") and is_ipex_imported() and "ipex" in BACKENDS:
        wanted.insert(0, "ipex")
    reasons = [] if wanted != ["eager"] else [f"no backend for {device} in this version"]
    for name in wanted:
        if (reason := BACKENDS.get(name).available()) is None:
            break
        reasons.append(f"backend '{name}' is not available: {reason}")
    return name, "; ".join([*reasons, f"using '{name}'"]) if reasons else ""
