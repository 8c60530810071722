"""An ONNX file as lint reads it: nodes, producer and consumers of each tensor, types, shapes at batch 1, constants."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from fewbit.errors import BadFile, shortened, stopped
from fewbit.folder import MODEL
from fewbit.onnx_reader.work import multiplied

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
MOVES = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "GatherElements", "GatherND",
    "Expand", "Tile", "Identity", "Cast", "Constant", "ConstantOfShape", "Shape", "Size", "Range", "Dropout", "DepthToSpace",
    "SpaceToDepth",
}  # fmt: skip
FLOATS = frozenset((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE))
INT8, UINT8 = TensorProto.INT8, TensorProto.UINT8
MULTIPLYING = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm", "MatMulIntegerToFloat", "MultiHeadAttention", "QAttention"))
BITS: Mapping[int, int] = {
    TensorProto.INT8: 8, TensorProto.UINT8: 8, TensorProto.INT16: 16, TensorProto.UINT16: 16, TensorProto.INT32: 32,
    TensorProto.INT4: 4, TensorProto.UINT4: 4,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Node:
    """A node of the file; `name` is its own, or its first output where it has none."""

    index: int
    name: str
    op: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(repr=False)
    domain: str = ""

    @property
    def moves(self) -> bool:
        """Whether it only moves values, without computing."""
        return self.op in MOVES


@dataclass(frozen=True)
class Quantizer:
    """The parameters of a QuantizeLinear or DequantizeLinear: code type, scale, zero point (None where computed), axis."""

    dtype: int
    scale: NDArray[Any] | None
    zero: NDArray[Any] | None
    axis: int
    block: int = 0

    @property
    def per_tensor(self) -> bool:
        """Whether one constant scale holds for the whole tensor."""
        return self.scale is not None and self.scale.size == 1 and self.zero is not None and self.zero.size == 1

    @property
    def no_zero(self) -> bool:
        """Whether the zero point is a constant 0."""
        return self.zero is not None and not np.any(self.zero)

    @property
    def name(self) -> str:
        return str(TensorProto.DataType.Name(self.dtype)).lower()

    def same(self, other: Quantizer) -> bool:
        """Equal type, scale and zero point, all of them constant."""
        if self.scale is None or other.scale is None or self.zero is None or other.zero is None:
            return False
        return self.dtype == other.dtype and np.array_equal(self.scale, other.scale) and np.array_equal(self.zero, other.zero)

    def range(self) -> tuple[float, float]:
        """The smallest and the largest real number of a per-tensor pair."""
        assert self.scale is not None
        assert self.zero is not None
        limits = np.iinfo(onnx.helper.tensor_dtype_to_np_dtype(self.dtype))
        scale, zero = float(self.scale.flat[0]), int(self.zero.flat[0])
        return (limits.min - zero) * scale, (limits.max - zero) * scale


class Graph:
    """A file's main graph. Dynamic dimensions count as 1. Raises BadFile where onnx cannot read or check the file."""

    def __init__(self, path: Path) -> None:
        model = read(path)
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.nodes = [self._node(i, proto) for i, proto in enumerate(model.graph.node)]
        self.outputs = {value.name for value in model.graph.output}
        self.producer = {name: node for node in self.nodes for name in node.outputs if name}
        self.consumers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                self.consumers.setdefault(name, []).append(node)
        self.constants = set(self.initializers)
        for node in self.nodes:
            if node.op == "Constant" or (node.inputs and all(not n or n in self.constants for n in node.inputs)):
                self.constants.update(node.outputs)
        self.dtypes, self.shapes, self.dynamic = _infer(model)

    def _node(self, index: int, proto: onnx.NodeProto) -> Node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
        name = proto.name or next((o for o in proto.output if o), f"{proto.op_type}_{index}")
        standard = proto.domain in ("", "ai.onnx")
        has_schema = standard and onnx.defs.has(proto.op_type)
        version = onnx.defs.get_schema(proto.op_type, self.opset).since_version if has_schema else 1
        return Node(index, name, proto.op_type, version, tuple(proto.input), tuple(proto.output), attributes, proto.domain)

    @cached_property
    def computing(self) -> list[Node]:
        """Nodes that compute real numbers at every inference: no Q/DQ, constants or nodes that only move values."""
        return [
            node
            for node in self.nodes
            if node.op not in (QUANTIZE, DEQUANTIZE)
            and not node.moves
            and not set(node.outputs) <= self.constants
            and self.dtypes.get(node.outputs[0], TensorProto.FLOAT) in FLOATS
        ]

    def value(self, name: str) -> NDArray[Any] | None:
        """A constant's numbers, None where a node computes them."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producer.get(name)
        if node is not None and node.op == "Constant" and "value" in node.attributes:
            return numpy_helper.to_array(node.attributes["value"])
        if node is not None and node.op == "Identity":
            return self.value(node.inputs[0])
        return None

    def quantizer(self, node: Node) -> Quantizer:
        """The parameters of a QuantizeLinear or DequantizeLinear."""
        codes = node.outputs[0] if node.op == QUANTIZE else node.inputs[0]
        has_zero = len(node.inputs) > 2 and node.inputs[2] != ""
        scale, zero = self.value(node.inputs[1]), self.value(node.inputs[2]) if has_zero else None
        dtype = self.dtypes.get(codes, 0)
        if has_zero:
            dtype = self.dtypes.get(node.inputs[2], dtype)
        if not has_zero and scale is not None:
            zero = np.zeros_like(scale, dtype=np.int64)
        if dtype == 0 and node.op == QUANTIZE:
            dtype = node.attributes.get("output_dtype", 0) or UINT8
        return Quantizer(dtype, scale, zero, node.attributes.get("axis", 1), node.attributes.get("block_size", 0))

    def size(self, name: str) -> int:
        """The number of elements of a tensor at batch 1; 0 where its shape is unknown."""
        shape = self.shapes.get(name)
        return math.prod(shape) if shape is not None else 0

    def macs(self, node: Node) -> int:
        """Multiply-accumulates of a node at batch 1; 0 for nodes without, or where shapes are not known."""
        if node.op not in MULTIPLYING:
            return 0
        left, right = (self.shapes.get(name) for name in node.inputs[:2])
        if left is not None and node.op == "MatMulIntegerToFloat":  # its weight may be joined from several
            return self.size(node.outputs[0]) * left[-1]
        if left is not None and node.op == "QAttention":
            return 3 * self.size(node.outputs[0]) * left[-1] + self.float_macs(node)
        if left is None or right is None:
            return 0
        if node.op == "MultiHeadAttention":  # (b, s, d) and (b, t, d): scores, and the mean of values that they weigh
            return 2 * math.prod(left) * right[1]
        turned = bool(node.attributes.get("transA"))
        return multiplied(node.op, (left, right), self.size(node.outputs[0]), turned=turned)

    def float_macs(self, node: Node) -> int:
        """Float multiply-accumulates of a node with an integer kernel: the attention inside QAttention."""
        shape = self.shapes.get(node.outputs[0]) if node.op == "QAttention" else None
        return 2 * math.prod(shape) * shape[1] if shape is not None else 0


def read(path: Path) -> onnx.ModelProto:
    """The file. Raises BadFile that says what is wrong with it."""
    if os.path.isdir(path):
        raise BadFile(f"{path} is a folder; lint reads one ONNX file, that of a run as in fewbit lint {path / MODEL}.")
    if not os.path.isfile(path):
        raise BadFile(f"{path} does not exist; lint reads one ONNX file, as in fewbit lint run/model.onnx.")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:
        raise BadFile(
            f"{path} is not an ONNX file that lint can read: {shortened(str(error).strip().splitlines()[0], 200)}. Give an "
            "ONNX file that onnxruntime loads, as in fewbit lint run/model.onnx."
        ) from error
    return model


def _infer(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, Sequence[int]], set[str]]:
    """Element type and shape (dynamic dimensions 1) by tensor name, and the tensors whose shape depends on the input's."""
    fixed, free = _inferred(model, fix=True), _inferred(model, fix=False)
    dtypes = {t.name: t.data_type for t in fixed.initializer}
    shapes: dict[str, Sequence[int]] = {t.name: tuple(t.dims) for t in fixed.initializer}
    for value in (*fixed.input, *fixed.output, *fixed.value_info):
        tensor = value.type.tensor_type
        dtypes[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else 1 for d in tensor.shape.dim)
    values = {value.name: value.type.tensor_type for value in (*free.input, *free.output, *free.value_info)}
    static = {n for n, t in values.items() if t.HasField("shape") and all(d.HasField("dim_value") for d in t.shape.dim)}
    return dtypes, shapes, set(shapes) - static - {t.name for t in fixed.initializer}


def _standard(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Standard nodes with the types and shapes of an onnxruntime-only node; any other node as it is."""
    if node.domain != "com.microsoft":
        return [node]
    if node.op_type in (QUANTIZE, DEQUANTIZE):
        node.domain = ""
    if node.op_type == "MatMulIntegerToFloat":
        sums = f"{node.output[0]}_sums"
        product = onnx.helper.make_node("MatMulInteger", list(node.input[:2]), [sums])
        return [product, onnx.helper.make_node("Cast", [sums], list(node.output), to=TensorProto.FLOAT)]
    if node.op_type == "QAttention":  # as wide as a third of the product
        sums, parts = f"{node.output[0]}_sums", [node.output[0], f"{node.output[0]}_keys", f"{node.output[0]}_values"]
        product = onnx.helper.make_node("MatMulInteger", list(node.input[:2]), [sums])
        cast = onnx.helper.make_node("Cast", [sums], [f"{sums}_float"], to=TensorProto.FLOAT)
        return [product, cast, onnx.helper.make_node("Split", [f"{sums}_float"], parts, axis=-1, num_outputs=3)]
    if node.op_type == "MultiHeadAttention":  # a row for each query, as wide as the values, which are as wide as the queries
        return [onnx.helper.make_node("Identity", list(node.input[:1]), list(node.output[:1]))]
    return [node]


def _inferred(model: onnx.ModelProto, *, fix: bool) -> onnx.GraphProto:
    """The graph with the types and shapes that onnx finds. Q/DQ nodes of com.microsoft are inferred as the standard ones.

    With `fix` every dynamic dimension of an input is 1.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input if fix else ():
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    del copy.graph.value_info[:]
    nodes = [part for node in copy.graph.node for part in _standard(node)]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    try:
        return onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except Exception as error:  # of a file with operators that onnx does not know: what it says itself
        if halt := stopped(error):
            raise halt from error
        return model.graph
