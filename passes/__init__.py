"""Passes: transforms of the graph from one level to the next."""

if not __name__.startswith("inc_graph."):
    raise ImportError(f"{__name__!r} is part of inc_graph: write `import inc_graph.passes`")
