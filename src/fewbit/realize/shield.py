"""Standard nodes that keep onnxruntime from rewriting what is float beside codes, where its rewriting gives other numbers.

- It rounds the float weights of a convolution, transposed or not, between a DequantizeLinear and a QuantizeLinear to 8 bits by
  itself, and takes a softmax there from a table of integers. Between them may stand nodes that only put numbers elsewhere, and
  behind the convolution what it makes part of it or of the QuantizeLinear: a bias, a factor, a rectifier.
- It moves a QuantizeLinear in front of nodes that only put numbers elsewhere; where these read an output of the model, the
  output has codes' numbers afterwards.
- It turns maps to channels last where codes are, and bicubic interpolation to fewer pixels with them, which its own kernel then
  refuses.

All were found in onnxruntime 1.32 by verify; its switch for them would turn all integer kernels off.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fewbit.realize.fuse.nodes import MOVES, constant, dims, made_by, with_nothing

FOLDED = ("Add", "Sub", "Mul", "Div", "BatchNormalization", "Relu", "Clip")  # behind a convolution, where they read constants


def shield(model: ir.Model) -> None:
    """Put the nodes into a written model, in place."""
    for node in list(model.graph):
        if node.op_type == "Softmax" or (node.op_type in ("Conv", "ConvTranspose") and constant(node.inputs[1]) is not None):
            _separated(model.graph, node)
        elif node.op_type == "QuantizeLinear":
            _with_own_way(model.graph, node)
        elif node.op_type == "Resize" and _is_cubic(node) and not _has_more(node.outputs[0], node.inputs[0]):
            _channels_first(model.graph, node)


def _separated(graph: ir.Graph, node: ir.Node) -> None:
    """An addition of nothing between a float node that reads codes and what makes codes of all that it gives."""
    source, result = node.inputs[0], node.outputs[0]
    while made_by(source) in MOVES:
        source = source.producer().inputs[0]  # type: ignore[union-attr]
    if made_by(source) != "DequantizeLinear" or result.is_graph_output() or not _only_quantized(result):
        return
    users = set(result.consumers())
    with_nothing(graph, [user for user in graph if user in users], result)


def _is_cubic(node: ir.Node) -> bool:
    mode, antialias = node.attributes.get("mode"), node.attributes.get("antialias")
    return mode is not None and mode.as_string() == "cubic" and (antialias is None or not antialias.as_int())


def _has_more(result: ir.Value, source: ir.Value | None) -> bool:
    """Whether one is known to have no fewer pixels than the other, in height and in width."""
    sizes = [(a, b) for a, b in zip(dims(result)[2:], dims(source)[2:], strict=False) if a is not None and b is not None]
    return len(sizes) == 2 and all(a >= b for a, b in sizes)


def _channels_first(graph: ir.Graph, node: ir.Node) -> None:
    """A reshape to the same shape in front of a node: onnxruntime moves no transposition across it."""
    source = node.inputs[0]
    assert source is not None
    name = f"{node.outputs[0].name}_shape"
    same = ir.Value(name=name, const_value=ir.tensor(np.zeros(4, np.int64), name=name))  # 0: as it is
    graph.register_initializer(same)
    kept = ir.node("Reshape", [source, same], num_outputs=1)
    kept.outputs[0].name, kept.outputs[0].type = f"{node.outputs[0].name}_source", source.type
    kept.outputs[0].shape = source.shape
    graph.insert_before(node, kept)
    node.replace_input_with(0, kept.outputs[0])


def _only_quantized(value: ir.Value) -> bool:
    """Whether all that reads a value, perhaps put elsewhere or in nodes that are folded, makes codes of it."""
    users = list(value.consumers())
    return bool(users) and all(user.op_type == "QuantizeLinear" or _hands_on(user, value) for user in users)


def _hands_on(node: ir.Node, value: ir.Value) -> bool:
    others = [one for one in node.inputs if one is not None and one is not value]
    folded = node.op_type in MOVES or (node.op_type in FOLDED and all(constant(one) is not None for one in others))
    return folded and not node.outputs[0].is_graph_output() and _only_quantized(node.outputs[0])


def _with_own_way(graph: ir.Graph, quantizer: ir.Node) -> None:
    """Codes of an output of the model that are put elsewhere: quantized before they are, too, which changes no code."""
    way: list[ir.Node] = []
    value = quantizer.inputs[0]
    while value is not None and not value.is_graph_output():
        node = value.producer()
        if node is None or node.op_type not in MOVES:
            return
        way.append(node)
        value = node.inputs[0]
    scale = quantizer.inputs[1]
    if value is None or not way or scale is None or (number := constant(scale)) is None or number.size > 1:
        return
    early = ir.node("QuantizeLinear", quantizer.inputs, num_outputs=1)
    early.replace_input_with(0, value)
    new = [early, ir.node("DequantizeLinear", [early.outputs[0], *quantizer.inputs[1:]], num_outputs=1)]
    for node in reversed(way):
        inputs = [new[-1].outputs[0], *node.inputs[1:]]
        new.append(ir.node(node.op_type, inputs, dict(node.attributes), num_outputs=1))
        new[-1].outputs[0].shape, new[-1].outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    for i, node in enumerate(new):
        node.name = f"{quantizer.name}.early{i}"
        node.outputs[0].name = f"{quantizer.name}.early{i}.output"
    graph.insert_before(quantizer, new)
    quantizer.replace_input_with(0, new[-1].outputs[0])
