"""Methods of one's own: a base class for what they do, and the table in which `prepare` and `convert` find them."""

from inc_graph.algorithms.entries import algos_mapping, register_algo
from inc_graph.algorithms.quantizer import Quantizer, get_quantizer, postprocess_model

__all__ = ["Quantizer", "algos_mapping", "get_quantizer", "postprocess_model", "register_algo"]
