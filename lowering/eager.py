"""The reference backend: runs the Q-DQ graph as it is, everywhere. It defines what the IR means, bit for bit."""

from inc_graph.lowering.base import Backend
from inc_graph.registry import BACKENDS


class Eager(Backend):
    """No claims: every operator runs on its reference implementation."""

    name = "eager"

    def available(self) -> str | None:
        return None


BACKENDS.add("eager", Eager())
