"""Device and backend detection, progress bars."""

from inc_graph.utils.device import choose_backend, detect_device, is_ipex_imported
from inc_graph.utils.progress import progress

__all__ = ["choose_backend", "detect_device", "is_ipex_imported", "progress"]
