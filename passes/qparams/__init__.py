"""Algorithms that find scales and zero points: pure tensor mathematics, one algorithm a file."""
