"""What a file whose batch is fixed needs beside the others."""

from __future__ import annotations

import onnx_ir as ir

from fewbit.realize.fuse.nodes import constant, dims, made_by, remove_dead


def keep_products(graph: ir.Graph) -> None:
    """Biases behind products of codes as rows of the product's rank.

    Where all shapes are known, onnxruntime makes a float Gemm of a product and a flat row behind it before it looks for Q/DQ.
    """
    for node in [node for node in graph if node.op_type == "Add"]:
        sides = list(node.inputs)
        place = next((i for i, side in enumerate(sides) if made_by(side) == "MatMul"), None)
        if place is None or len(sides) != 2:
            continue
        product, row = sides[place], sides[1 - place]
        numbers, rank = constant(row), len(dims(product))
        assert product is not None
        source = product.producer()
        if (
            numbers is None
            or numbers.ndim != 1
            or rank < 3
            or source is None
            or made_by(source.inputs[1]) != "DequantizeLinear"
        ):
            continue
        assert row is not None
        shaped = ir.tensor(numbers.reshape([1] * (rank - 1) + [-1]))
        value = ir.Value(
            name=f"{row.name}_{rank}d", type=row.type, shape=ir.Shape([1] * (rank - 1) + [numbers.size]), const_value=shaped
        )
        graph.initializers.setdefault(value.name or "", value)
        node.replace_input_with(1 - place, graph.initializers[value.name or ""])
    remove_dead(graph)
