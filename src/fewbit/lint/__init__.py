"""Lint: which nodes of any Q/DQ file run in integers on a target, and how the installed runtimes really run them.

lint              which by which rule, and what to change
graph             an ONNX file as lint reads it
rules             verdicts, and what the rules of all runtimes share
onnxruntime_cpu   what onnxruntime fuses on a processor; onnxruntime_qdq: where it has moved Q/DQ before
openvino_cpu      what openvino makes integer kernels of
tensorrt          what TensorRT does, predicted only
accelerator       a machine that is known by its target file, predicted only
truth             how a runtime really runs each node
"""

from fewbit.lint.lint import Lint, Row, disagreements, lint
from fewbit.lint.truth import Ran, truth

__all__ = ["Lint", "Ran", "Row", "disagreements", "lint", "truth"]
