"""Forms for onnxruntime; a file with operators of its domain com.microsoft runs there and nowhere else.

matmul_bias           DequantizeLinear x 2, MatMul, Add  ->  MatMulIntegerToFloat with the bias in the kernel
multi_head_attention  Reshape, Transpose x 3, MatMul, Softmax, MatMul, Transpose, Reshape, all float  ->  MultiHeadAttention
joint_qkv             the three products in front of one attention, if they read the same codes: one product, Split behind it
qattention            this product, the Split and the attention  ->  QAttention: multiplies in integers, attends in float
quick_gelu            Sigmoid and Mul of dequantized codes (SiLU)  ->  QuickGelu, which it else makes only of float values
factors_in_rows       a product by channel beside codes  ->  its factors repeated along the width (Expand, made when the file is
                      loaded): channels are last there, and a row of a map is multiplied at once in place of one pixel
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fewbit.realize.fuse.nodes import constant, dims, factors_by_channel, made_by, put

DOMAIN = "com.microsoft"
HEADS, TURNED = (0, 2, 1, 3), (0, 2, 3, 1)  # (b, tokens, heads, width) to (b, heads, tokens, width), and transposed


def product_bias(graph: ir.Graph, node: ir.Node) -> bool:
    """`node` and the addition of a constant row behind it, if it is a product of codes with a constant's."""
    if node.op_type != "MatMul" or any(x is None or made_by(x) != "DequantizeLinear" for x in node.inputs):
        return False
    source, weight = (x.producer() for x in node.inputs if x is not None)
    assert source is not None
    assert weight is not None
    if made_by(source.inputs[0]) not in ("QuantizeLinear", "Clip") or len(dims(weight.inputs[0])) != 2:
        return False
    if len(weight.inputs) < 3:  # scales of blocks, or 4-bit codes: there is no such kernel
        return False
    if any(constant(side.inputs[1]) is None for side in (source, weight)) or constant(source.inputs[1]).size != 1:  # type: ignore[union-attr]
        return False
    result, bias = node.outputs[0], None
    users = list(result.consumers())
    if len(users) == 1 and users[0].op_type == "Add" and not result.is_graph_output():
        other = next((x for x in users[0].inputs if x is not result), None)
        if other is not None and constant(other) is not None and len(dims(other)) == 1:
            result, bias = users[0].outputs[0], other
    zero = weight.inputs[2] if _moved(weight.inputs[2]) else None  # without one the kernel has less to add
    inputs = [source.inputs[0], weight.inputs[0], source.inputs[1], weight.inputs[1], source.inputs[2], zero, bias]
    put(graph, node, ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN, num_outputs=1), result)
    return True


@dataclass(frozen=True)
class _Side:
    """An operand of attention: what it is before it is cut into heads, the heads, and what it is multiplied by."""

    value: ir.Value
    heads: int
    scale: float


def attention(graph: ir.Graph, node: ir.Node) -> bool:
    """The whole of an attention whose softmax is `node`, if it is float throughout and has neither mask nor bias."""
    if node.op_type != "Softmax" or node.attributes.get_int("axis", -1) not in (-1, 3):
        return False
    scores, scale = _scaled(node.inputs[0])
    product, behind = scores.producer(), list(node.outputs[0].consumers())
    if product is None or product.op_type != "MatMul" or len(behind) != 1 or behind[0].op_type != "MatMul":
        return False
    if behind[0].inputs[0] is not node.outputs[0]:
        return False
    operands = ((product.inputs[0], HEADS), (product.inputs[1], TURNED), (behind[0].inputs[1], HEADS))
    candidates = [_side(x, turn) for x, turn in operands]
    result = _joined(behind[0].outputs[0])
    sides = [side for side in candidates if side is not None]
    if len(sides) < 3 or result is None or len({side.heads for side in sides}) > 1:
        return False
    query, key, value = sides
    if value.scale != 1.0:
        return False
    attributes = {"num_heads": query.heads, "scale": scale * query.scale * key.scale}
    fused = ir.node("MultiHeadAttention", [s.value for s in sides], attributes, domain=DOMAIN, num_outputs=1)
    last = result.producer()
    assert last is not None
    put(graph, last, fused, result)
    return True


def joint_products(graph: ir.Graph, node: ir.Node) -> bool:
    """The three products in front of `node`, an attention in one kernel, as one: a start of all threads instead of three."""
    if node.op_type != "MultiHeadAttention":
        return False
    results = [x for x in node.inputs[:3] if x is not None]
    producers = [x.producer() for x in results]
    if len(results) < 3 or any(n is None or n.op_type != "MatMulIntegerToFloat" or len(n.inputs) != 7 for n in producers):
        return False
    products = [n for n in producers if n is not None]
    first = products[0]
    alike = all(n.inputs[i] is first.inputs[i] for n in products for i in (0, 2, 4))
    if not alike or any(len(list(x.consumers())) != 1 or x.is_graph_output() for x in results):
        return False
    if any(constant(n.inputs[i]) is None or len(dims(n.inputs[i])) != 1 for n in products for i in (3, 6)):
        return False
    width = [dims(n.inputs[6])[0] for n in products]
    if any(dims(n.inputs[3])[0] != w for n, w in zip(products, width, strict=True)):
        return False
    place = next(n for n in reversed(list(graph)) if n in products)
    inputs = list(first.inputs)
    if len({n.inputs[5] is None for n in products}) > 1:
        return False
    for i, axis in ((1, 1), (3, 0), (5, 0), (6, 0)):
        parts = [n.inputs[i] for n in products]
        if parts[0] is None:
            continue
        side = ir.node("Concat", parts, {"axis": axis}, num_outputs=1)  # of constants: made when the file is loaded
        graph.insert_before(place, side)
        inputs[i] = side.outputs[0]
    product = ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN, num_outputs=1)
    whole = results[0].shape
    if whole is not None:
        product.outputs[0].shape = ir.Shape([*list(whole)[:-1], sum(w or 0 for w in width)])
        product.outputs[0].type = results[0].type
    sizes = ir.Value(name=f"{results[0].name}_sizes", const_value=ir.tensor(np.array(width, np.int64)))
    graph.register_initializer(sizes)
    split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=3)
    graph.insert_before(place, [product, split])
    for old, new in zip(results, split.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}_before"
        ir.convenience.replace_all_uses_with(old, new)
    return True


def projected_attention(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, an attention, with the one product in front of it that makes its queries, keys and values.

    Its kernel knows one scale of scores, 1 / sqrt(width of a head); it makes each head where attention wants it, without
    Split and Transpose.
    """
    if node.op_type != "MultiHeadAttention" or any(x is None for x in node.inputs[:3]):
        return False
    split = node.inputs[0].producer()  # type: ignore[union-attr]
    if split is None or split.op_type != "Split" or list(node.inputs[:3]) != list(split.outputs):
        return False
    product = split.inputs[0].producer() if split.inputs[0] is not None else None
    if product is None or product.op_type != "MatMulIntegerToFloat" or product.inputs[6] is None:
        return False
    widths = [dims(x)[-1:] for x in split.outputs]
    heads, width = node.attributes.get_int("num_heads", 0), widths[0][0] if widths[0] else None
    usual = width is not None and np.isclose(node.attributes.get_float("scale", 0.0), (heads / width) ** 0.5, rtol=1e-6)
    if not usual or widths != [widths[0]] * 3 or split.attributes.get_int("axis", 0) not in (-1, 2):
        return False
    alone = all(len(list(x.consumers())) == 1 and not x.is_graph_output() for x in (split.inputs[0], *split.outputs))  # type: ignore[union-attr]
    if not alone:
        return False
    x, weight, scale, weight_scale, zero, weight_zero, bias = product.inputs
    inputs = [x, weight, bias, scale, weight_scale, None, zero, weight_zero]
    fused = ir.node("QAttention", inputs, {"num_heads": heads}, domain=DOMAIN, num_outputs=1)
    put(graph, node, fused, node.outputs[0])
    return True


def quick_gelu(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a sigmoid of dequantized codes that only the product with them reads, and this product."""
    users = list(node.outputs[0].consumers()) if node.op_type == "Sigmoid" and not node.outputs[0].is_graph_output() else []
    if len(users) != 1 or users[0].op_type != "Mul" or made_by(node.inputs[0]) != "DequantizeLinear":
        return False
    if {id(x) for x in users[0].inputs} != {id(node.inputs[0]), id(node.outputs[0])}:
        return False
    fused = ir.node("QuickGelu", [node.inputs[0]], {"alpha": 1.0}, domain=DOMAIN, num_outputs=1)
    put(graph, users[0], fused, users[0].outputs[0])
    return True


def factors_in_rows(graph: ir.Graph, node: ir.Node) -> bool:
    """`node`, a product of a map of known width, behind DequantizeLinear or in front of QuantizeLinear, by channel."""
    place, factors = factors_by_channel(node) or (0, np.empty(0))
    sizes, users = dims(node.outputs[0]), list(node.outputs[0].consumers())
    if factors.size < 2 or len(sizes) != 4 or sizes[3] is None:
        return False
    if made_by(node.inputs[1 - place]) != "DequantizeLinear" and not all(user.op_type == "QuantizeLinear" for user in users):
        return False
    name = f"{node.outputs[0].name}_row"
    shape = ir.Value(name=name, const_value=ir.tensor(np.array([1, sizes[1], 1, sizes[3]], np.int64), name=name))
    graph.register_initializer(shape)
    row = ir.node("Expand", [node.inputs[place], shape], num_outputs=1)
    graph.insert_before(node, row)
    node.replace_input_with(place, row.outputs[0])
    return True


def _side(value: ir.Value | None, turn: tuple[int, ...]) -> _Side | None:
    """(b, tokens, heads · width) that `value` is cut from by Reshape and Transpose, with factors anywhere on the way."""
    if value is None:
        return None
    value, scale = _scaled(value)
    order = list(range(4))
    while (turned := value.producer()) is not None and turned.op_type == "Transpose":
        turns = turned.attributes.get_ints("perm", ())
        if len(turns) != len(order):  # heads and images are one dimension, as in nn.MultiheadAttention
            return None
        order = [turns[i] for i in order]
        value, factor = _scaled(turned.inputs[0])
        scale *= factor
    if tuple(order) != turn or turned is None or turned.op_type != "Reshape":
        return None
    source, factor = _scaled(turned.inputs[0])
    shape, sizes = constant(turned.inputs[1]), dims(source)
    if shape is None or len(shape) != 4 or len(sizes) != 3 or shape[1] != sizes[1] or shape[2] * shape[3] != sizes[2]:
        return None
    return _Side(source, int(shape[2]), scale * factor)


def _joined(value: ir.Value) -> ir.Value | None:
    """(b, tokens, heads · width) that Transpose and Reshape make of (b, heads, tokens, width), if nothing else reads it."""
    for op, turn in (("Transpose", HEADS), ("Reshape", None)):
        users = list(value.consumers())
        if len(users) != 1 or users[0].op_type != op:
            return None
        if turn is not None and tuple(users[0].attributes.get_ints("perm", ())) != turn:
            return None
        value = users[0].outputs[0]
    return value if len(dims(value)) == 3 else None


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """What is multiplied by constant numbers to give `value`, and their product; values that others read too stay."""
    scale = 1.0
    assert value is not None
    while (node := value.producer()) is not None and node.op_type == "Mul" and len(list(value.consumers())) == 1:
        numbers = [(x, c) for x in node.inputs if (c := constant(x)) is not None and c.size == 1]
        if len(numbers) != 1:
            break
        scale *= float(numbers[0][1].reshape(()))
        value = next(x for x in node.inputs if x is not None and x is not numbers[0][0])
    return value, scale


def _moved(value: ir.Value | None) -> bool:
    """Whether zero points may be other than zero."""
    zero = constant(value)
    return value is not None and (zero is None or bool(zero.any()))
