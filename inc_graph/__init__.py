"""inc_graph: a graph compiler that quantizes PyTorch models.

Importing the package is cheap: torch is loaded by the submodules that need it.
"""

__version__ = "0.1.0"
