"""A product by channel beside codes as a scale for each channel: the factors are powers of two, so no number is another.

For openvino alone: onnxruntime 1.32 makes codes with a scale for each channel number by number where channels are last, and
YOLOX-nano took eight times as long.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fewbit.realize.fuse.nodes import constant, factors_by_channel, made_by


def by_channel(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a product of a map with powers of two behind a DequantizeLinear or in front of QuantizeLinear, left out."""
    factor = _factor(node)
    if factor is None or node.outputs[0].is_graph_output():
        return False
    source, users = node.inputs[0], list(node.outputs[0].consumers())
    assert source is not None
    if all(user.op_type == "QuantizeLinear" and _has_one(user) for user in users):
        for user in users:
            _rescaled(graph, user, 1 / factor)
            user.replace_input_with(0, source)
        return True
    reader = source.producer()
    if reader is None or made_by(source) != "DequantizeLinear" or len(list(source.consumers())) != 1 or not _has_one(reader):
        return False
    if source.is_graph_output():
        return False
    _rescaled(graph, reader, factor)
    ir.convenience.replace_all_uses_with(node.outputs[0], source)
    return True


def _factor(node: ir.Node) -> np.ndarray | None:
    """The powers of two (channels,) that a node multiplies the channels of a map by; None for another node."""
    place, factors = factors_by_channel(node) or (0, np.empty(0))
    return factors if place == 1 and factors.dtype == np.float32 and bool((np.frexp(factors)[0] == 0.5).all()) else None


def _has_one(node: ir.Node) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear has one scale, which is known."""
    numbers = [constant(value) for value in node.inputs[1:3]]
    return len(numbers) == 2 and all(number is not None and number.size == 1 for number in numbers)


def _rescaled(graph: ir.Graph, node: ir.Node, factor: np.ndarray) -> None:
    """Give a QuantizeLinear or DequantizeLinear a scale for each channel: its own times the factors."""
    scale, zero = (constant(value) for value in node.inputs[1:3])
    assert scale is not None
    assert zero is not None
    numbers = {
        "scale": (scale.reshape(()) * factor).astype(np.float32),
        "zero": np.full(factor.shape, zero.reshape(()), zero.dtype),
    }
    for place, (name, number) in enumerate(numbers.items(), 1):
        value = ir.Value(
            name=f"{node.outputs[0].name}_{name}s", const_value=ir.tensor(number, name=f"{node.outputs[0].name}_{name}s")
        )
        graph.register_initializer(value)
        node.replace_input_with(place, value)
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
