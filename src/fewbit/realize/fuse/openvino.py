"""Fused operators of openvino, in standard nodes.

quantize_before_reshape  MatMul, Transpose, Reshape, QuantizeLinear  ->  MatMul, QuantizeLinear, Transpose, Reshape: the codes
                         of attention's result are computed inside openvino's kernel, and bytes are moved in place of floats
quantize_before_concat   Concat, QuantizeLinear  ->  QuantizeLinear of each part, Concat: what openvino runs, so that the codes
                         that it shows are those that it uses where a number stands on the border of two
clip_before_quantize     QuantizeLinear, Clip  ->  Clip, QuantizeLinear: codes of fewer bits than their container are clipped
                         as real numbers, in the kernel that makes them, and not as codes in one of their own
scale_before_norm        DequantizeLinear, ..., norm  ->  DequantizeLinear, ..., Add of nothing, norm: openvino would normalize
                         codes, or their products, and add the norm's epsilon to their variance as it is
reduce_keeping_axes      ReduceMean  ->  ReduceMean that keeps its axes, Squeeze: where the kernel drops them, openvino 2026
                         takes the scales and terms by channel that it fuses behind it from the wrong places
quantize_rows            Concat, moves, QuantizeLinear  ->  Concat, moves, Reshape to rows, QuantizeLinear, Reshape, where parts
                         do not stand side by side along the channels (torch.stack): openvino 2026 would quantize each part,
                         and its own pass about products refuses scales by part, so that it cannot load the file
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fewbit.realize.fuse.nodes import MOVES, constant, dims, made_by, put, with_nothing

NORMS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization")
SCALED = (*MOVES, "AveragePool", "Concat", "Relu", "Resize", "Split")  # of numbers times a scale that times of the numbers


def early_codes(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a quantizer with one scale, moved in front of the Transpose and the Reshape that join the heads."""
    numbers = [constant(x) for x in node.inputs[1:]]
    if node.op_type != "QuantizeLinear" or any(c is None or c.size != 1 for c in numbers):
        return False
    last = _cut(node) or node
    if any(user.op_type != "DequantizeLinear" for user in last.outputs[0].consumers()):
        return False
    path: list[ir.Node] = []
    value = node.inputs[0]
    for op in ("Reshape", "Transpose", "MatMul"):
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type != op or len(list(producer.outputs[0].consumers())) != 1:
            return False
        if producer.outputs[0].is_graph_output():
            return False
        path.append(producer)
        value = producer.inputs[0]
    reshape, transpose, product = path
    moved = [ir.node("QuantizeLinear", [product.outputs[0], *node.inputs[1:]], node.attributes, num_outputs=1, name=node.name)]
    if last is not node:
        moved.append(ir.node("Clip", [moved[-1].outputs[0], *last.inputs[1:]], num_outputs=1))
    moved.append(ir.node("Transpose", [moved[-1].outputs[0]], transpose.attributes, num_outputs=1))
    joined = ir.node("Reshape", [moved[-1].outputs[0], reshape.inputs[1]], reshape.attributes, num_outputs=1)
    graph.insert_before(node, moved)
    put(graph, last, joined, last.outputs[0])
    return True


def codes_of_parts(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a quantizer with one scale that alone reads a Concat, in front of it, once for each part."""
    joined = node.inputs[0].producer() if node.op_type == "QuantizeLinear" and node.inputs[0] else None
    if joined is None or joined.op_type != "Concat" or joined.outputs[0].is_graph_output():
        return False
    if len(list(joined.outputs[0].consumers())) != 1 or any((c := constant(x)) is None or c.size != 1 for x in node.inputs[1:]):
        return False
    last = _cut(node) or node
    codes: list[ir.Value] = []
    for i, part in enumerate(joined.inputs):
        new = [ir.node("QuantizeLinear", [part, *node.inputs[1:]], node.attributes, num_outputs=1, name=f"{node.name}.{i}")]
        if last is not node:
            new.append(ir.node("Clip", [new[0].outputs[0], *last.inputs[1:]], num_outputs=1))
        graph.insert_before(node, new)
        codes.append(new[-1].outputs[0])
    put(graph, last, ir.node("Concat", codes, joined.attributes, num_outputs=1), last.outputs[0])
    return True


def cut_numbers(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a quantizer with one scale whose codes are cut behind it, with its input cut at the numbers of the last codes."""
    clip = _cut(node) if node.op_type == "QuantizeLinear" else None
    if clip is None:
        return False
    scale, zero, *ends = (constant(x) for x in (*node.inputs[1:], *clip.inputs[1:]))
    if any(c is None or c.size != 1 for c in (scale, zero, *ends)) or len(ends) != 2:
        return False
    assert scale is not None
    assert zero is not None
    numbers = [(np.float32(int(end) - int(zero)) * scale.reshape(())).astype(np.float32) for end in ends if end is not None]
    limits = []
    for name, number in zip(("least", "most"), numbers, strict=True):
        limits.append(ir.Value(name=f"{clip.outputs[0].name}_{name}", const_value=ir.tensor(number)))
        graph.register_initializer(limits[-1])
    held = ir.node("Clip", [node.inputs[0], *limits], num_outputs=1)
    quantizer = ir.node("QuantizeLinear", [held.outputs[0], *node.inputs[1:]], node.attributes, num_outputs=1, name=node.name)
    graph.insert_before(clip, held)
    put(graph, clip, quantizer, clip.outputs[0])
    return True


def kept_scale(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a norm of numbers that are codes times a scale, with nothing added to them before all norms that read them."""
    value = node.inputs[0] if node.op_type in NORMS else None
    if value is None or not _is_scaled(value):
        return False
    with_nothing(graph, [other for other in graph if other.op_type in NORMS and other.inputs[0] is value], value)
    return True


def kept_axes(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a reduction that drops its axes, as one that keeps them and a Squeeze."""
    keeps = node.attributes.get("keepdims")
    if not node.op_type.startswith("Reduce") or len(node.inputs) < 2 or keeps is None or keeps.as_int():
        return False
    kept = ir.node(node.op_type, node.inputs, {**node.attributes, "keepdims": 1}, num_outputs=1, name=node.name)
    graph.insert_before(node, kept)
    put(graph, node, ir.node("Squeeze", [kept.outputs[0], node.inputs[1]], num_outputs=1), node.outputs[0])
    return True


def codes_by_rows(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a quantizer with one scale of parts that were put elsewhere: of their rows, and the codes put back. Where
    nothing stands between, `codes_of_parts` does it.
    """
    read, parts = node.inputs[0], node.inputs[0]
    if node.op_type != "QuantizeLinear" or any((c := constant(x)) is None or c.size != 1 for x in node.inputs[1:]):
        return False
    while made_by(parts) in (*MOVES, "Clip", "Relu"):
        parts = parts.producer().inputs[0]  # type: ignore[union-attr]
    sizes, rank = dims(read), len(dims(parts))
    if read is None or parts is None or parts is read or made_by(parts) != "Concat" or len(sizes) < 2 or sizes[-1] is None:
        return False
    axis = parts.producer().attributes["axis"].as_int() % rank  # type: ignore[union-attr]
    if (rank, axis) == (4, 1) or axis == rank - 1:  # along the channels
        return False
    last = _cut(node) or node
    if not _feeds_product(last.outputs[0]):
        return False
    shape = ir.Value(name=f"{last.outputs[0].name}_rows", const_value=ir.tensor(np.array([-1, sizes[-1]], np.int64)))
    graph.register_initializer(shape)
    rows, whole = ir.node("Reshape", [read, shape], num_outputs=1), ir.node("Shape", [read], num_outputs=1)
    new = [rows, ir.node("QuantizeLinear", [rows.outputs[0], *node.inputs[1:]], node.attributes, num_outputs=1, name=node.name)]
    if last is not node:
        new.append(ir.node("Clip", [new[-1].outputs[0], *last.inputs[1:]], num_outputs=1))
    graph.insert_before(node, [*new, whole])
    put(graph, last, ir.node("Reshape", [new[-1].outputs[0], whole.outputs[0]], num_outputs=1), last.outputs[0])
    return True


def _is_scaled(value: ir.Value | None) -> bool:
    """Whether openvino can take a value for codes, or products of codes, times a scale; not where a constant is added to it."""
    seen, open_values = set[ir.Value | None](), [value]
    while open_values:
        value = open_values.pop()
        node = None if value is None or value in seen else value.producer()
        seen.add(value)
        if node is None:
            continue
        if node.op_type == "DequantizeLinear":
            return True
        fixed = any(constant(x) is not None for x in node.inputs)
        if (
            node.op_type in ("Conv", "MatMul", *SCALED)
            or (node.op_type == "Mul" and fixed)
            or (node.op_type == "Add" and not fixed)
        ):
            open_values += node.inputs
    return False


def _feeds_product(value: ir.Value) -> bool:
    """Whether a product reads codes, perhaps put elsewhere."""
    users = list(value.consumers())
    passing = (user.outputs[0] for user in users if user.op_type in ("DequantizeLinear", *MOVES))
    return any(user.op_type == "MatMul" for user in users) or any(_feeds_product(result) for result in passing)


def _cut(node: ir.Node) -> ir.Node | None:
    """The Clip that alone reads a quantizer's codes, if there is one."""
    users = list(node.outputs[0].consumers())
    alone = len(users) == 1 and users[0].op_type == "Clip" and not node.outputs[0].is_graph_output()
    return users[0] if alone else None
