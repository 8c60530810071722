"""The products that nodes of a file sum, for one image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto

from fewbit.core.graph import FloatProduct
from fewbit.onnx_reader.file import domain, title

RECURRENT = ("GRU", "LSTM", "RNN")
Shape = Sequence[int]


def products(model: ModelProto) -> Iterator[FloatProduct]:
    """The nodes of a file that sum products, with how many, where onnx infers their shapes; a size that it does not know counts
    as one. What stands in a loop or a branch is not counted.
    """
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, Shape] = {one.name: tuple(one.dims) for one in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = _shape(value)
    for node in graph.node:
        count = 0 if domain(node) else _count(node, shapes)
        if count:
            yield FloatProduct(title(node), node.op_type, count)


def _shape(value: ValueInfoProto) -> Shape:
    return tuple(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)


def _count(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    """The products of one node; 0 for one without, or of unknown shapes."""
    weights = 3 if node.op_type in RECURRENT else 2
    read = [shapes[name] for name in node.input[:weights] if name in shapes]
    if len(read) < weights or not all(read):
        return 0
    turned = any(one.name == "transA" and one.i for one in node.attribute)
    return multiplied(node.op_type, read, math.prod(shapes.get(node.output[0], (0,))), turned=turned)


def multiplied(op: str, read: Sequence[Shape], written: int, *, turned: bool = False) -> int:
    """The products that a standard operator sums: `read` are the shapes of its operands, `written` is how many numbers it
    writes, and `turned` is transA of a Gemm. 0 for an operator without.
    """
    if op in RECURRENT:  # (time, batch, inputs), (directions, gates, inputs) and (directions, gates, hidden)
        return math.prod(read[0][:2]) * (math.prod(read[1]) + math.prod(read[2]))
    if op == "Conv":
        return written * math.prod(read[1][1:])
    if op == "ConvTranspose":
        return math.prod(read[0]) * math.prod(read[1][1:])
    return written * read[0][0 if turned else -1] if op in ("MatMul", "Gemm") else 0
