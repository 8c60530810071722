"""The operators that are taken, by domain and name: from a node and what it reads to what it writes."""

from __future__ import annotations

from fewbit.onnx_reader.arithmetic import ARITHMETIC
from fewbit.onnx_reader.attention import ATTENTION
from fewbit.onnx_reader.indexing import INDEXING
from fewbit.onnx_reader.layers import LAYERS
from fewbit.onnx_reader.microsoft import MICROSOFT
from fewbit.onnx_reader.norms import NORMS, rms_norm
from fewbit.onnx_reader.recurrent import RECURRENT
from fewbit.onnx_reader.reduction import REDUCTION
from fewbit.onnx_reader.resize import RESIZE
from fewbit.onnx_reader.shape import SHAPE
from fewbit.onnx_reader.values import Registry

STANDARD: Registry = {
    **ARITHMETIC,
    **SHAPE,
    **INDEXING,
    **REDUCTION,
    **LAYERS,
    **NORMS,
    **RESIZE,
    **ATTENTION,
    **RECURRENT,
    "SimplifiedLayerNormalization": rms_norm,  # onnxruntime's optimizer writes it into the standard domain
}
OPERATORS: dict[str, Registry] = {"": STANDARD, "com.microsoft": MICROSOFT}
CONTROL = ("If", "Constant")  # which module.py runs
