"""The command `inc-graph`. A module a command; none of them imports torch before it is asked to do something."""

from inc_graph.cli.app import main

__all__ = ["main"]
