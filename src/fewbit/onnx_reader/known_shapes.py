"""What is known of the sizes of the values in a file without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
from onnx import ModelProto, ValueInfoProto, helper

NOTHING = ValueInfoProto()
FEW = 64  # numbers of a weight that may be a shape
Shapes = Mapping[str, ValueInfoProto]


def shapes_of(model: ModelProto) -> Shapes:
    """Types and shapes of values, where they follow; a batch without a name gets one for it."""
    firsts = [one.type.tensor_type.shape.dim[0] for one in model.graph.input if len(one.type.tensor_type.shape.dim) == 4]
    unnamed = [dim for dim in firsts if dim.dim_value <= 0 and not dim.dim_param]
    for dim in unnamed:
        dim.dim_param = "batch"
    found = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for dim in unnamed:
        dim.Clear()
    return {one.name: one for one in (*found.value_info, *found.output, *found.input)}


def dims_of(info: ValueInfoProto) -> list[int | str | None]:
    dims = info.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims]


def without_numbers(model: ModelProto) -> ModelProto:
    """A model with the shapes of its larger weights alone, as inputs."""
    graph = model.graph
    large = [one for one in graph.initializer if math.prod(one.dims) > FEW]
    named, taken = {one.name for one in large}, {one.name for one in graph.input}
    inputs = [helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in large if one.name not in taken]
    light = helper.make_graph(
        graph.node, graph.name, [*graph.input, *inputs], graph.output,
        [one for one in graph.initializer if one.name not in named], value_info=graph.value_info,
    )  # fmt: skip
    return helper.make_model(light, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions)


def known_sizes(found: list[int | str | None], said: list[int | str | None], batch: int | str | None) -> list[int | str | None]:
    """The sizes of an output: those that follow, and where none does, those that the file says."""
    if len(found) != len(said):
        return found or said
    return [a if isinstance(a, int) or a == batch or b is None else b for a, b in zip(found, said, strict=True)]
