"""Operator patterns: where in the graph a quantizer may stand, one family of operators a file."""
