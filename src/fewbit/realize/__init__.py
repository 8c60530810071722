"""Realize: a plan as files that run. qdq: a standard Q/DQ ONNX graph; packed: the plan itself, weights bit-packed."""

from fewbit.realize.images import with_metadata
from fewbit.realize.packed import load_plan, save_plan
from fewbit.realize.qdq import float_onnx, realize, rendered, rendered_float, save

__all__ = ["float_onnx", "load_plan", "realize", "rendered", "rendered_float", "save", "save_plan", "with_metadata"]
