"""Helpers: device and backend detection."""

from inc_graph.utils.device import choose_backend, detect_device, is_ipex_imported

__all__ = ["choose_backend", "detect_device", "is_ipex_imported"]
