"""The format of saved models: a folder of JSON and safetensors files. No pickle, in either direction."""

from inc_graph.saving.folder import is_saved_model
from inc_graph.saving.graphs import read_graph, write_graph
from inc_graph.saving.model_files import SavedModel, read_model, write_model

__all__ = ["SavedModel", "is_saved_model", "read_graph", "read_model", "write_graph", "write_model"]
