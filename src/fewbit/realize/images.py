"""What an ONNX file says of the images that it takes, and the nodes in front that make its input of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from fewbit.core.record import normalized_inside


def with_metadata(model: ir.Model, metadata: Mapping[str, str], place: int = 0) -> ir.Model:
    """The model with these entries in its metadata, in their order; where they say that it normalizes inside, it does: the
    input at `place` is the image.
    """
    model.metadata_props.update(metadata)
    numbers = normalized_inside(metadata)
    if numbers is not None:
        _normalize(model, place, *numbers)
    return model


def _normalize(model: ir.Model, place: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Take pixels, uint8 (batch, h, w, c), and compute (pixel / 255 - mean) / std in float32, in the order of Preprocess, then
    round to the type that the file took.
    """
    old = model.graph.inputs[place]
    assert old.name is not None
    assert old.shape is not None
    batch, channels, high, wide = old.shape
    shape = ir.Shape((batch, high, wide, channels))
    pixels = ir.Value(name=old.name, shape=shape, type=ir.TensorType(ir.DataType.UINT8))
    nodes = [ir.node("Transpose", [pixels], {"perm": [0, 3, 1, 2]})]
    nodes.append(ir.node("Cast", nodes[-1].outputs, {"to": ir.DataType.FLOAT}))
    for kind, name, number in (("Div", "white", [255.0]), ("Sub", "mean", mean), ("Div", "std", std)):
        array = np.array(number, np.float32).reshape(1, -1, 1, 1)
        constant = ir.Value(name=f"{old.name}.{name}", const_value=ir.tensor(array, name=f"{old.name}.{name}"))
        constant.shape, constant.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(constant)
        nodes.append(ir.node(kind, [*nodes[-1].outputs, constant]))
    if old.dtype != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", nodes[-1].outputs, {"to": old.dtype}))
    for node, name in zip(nodes, ("planes", "floats", "unit", "centred", "normalized", "rounded"), strict=False):
        node.name, node.outputs[0].name = f"{old.name}.{node.op_type}.{name}", f"{old.name}.{name}"
    ir.convenience.replace_all_uses_with(old, nodes[-1].outputs[0])
    model.graph.inputs[place] = pixels
    model.graph.insert_before(model.graph[0], nodes)
