"""Realize: a plan as files that run. qdq: a standard Q/DQ ONNX graph; packed: the plan itself, weights bit-packed."""

from fewbit.realize.packed import load_plan, save_plan
from fewbit.realize.qdq import float_onnx, realize, rendered, rendered_float

__all__ = ["float_onnx", "load_plan", "realize", "rendered", "rendered_float", "save_plan"]
