"""Search: bits per op under hard limits, the front of accuracy, milliseconds and bytes, and its points as ONNX files."""

from fewbit.search.search import execute, search

__all__ = ["execute", "search"]
