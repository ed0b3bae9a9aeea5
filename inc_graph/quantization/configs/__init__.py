"""The config classes, a family a file. Users import them from `inc_graph.quantization`."""
