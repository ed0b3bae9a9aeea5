"""Lowerings: one backend a file, each turns the Q-DQ graph into what one machine runs."""

if not __name__.startswith("inc_graph."):
    raise ImportError(f"{__name__!r} is part of inc_graph: write `import inc_graph.lowering`")
