"""Nodes and values of an ONNX graph, as every form needs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

MOVES = ("Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
NOTHING = np.float32(1e-45)  # the smallest number above 0: added to any number it is rounded away, and it is no 0 to leave out


def put(graph: ir.Graph, place: ir.Node, node: ir.Node, result: ir.Value) -> None:
    """Insert `node` before `place`; its output replaces `result` and takes its name, type and shape."""
    new = node.outputs[0]
    new.name, new.type, new.shape = result.name, result.type, result.shape
    result.name = f"{result.name}_before"
    graph.insert_before(place, node)
    ir.convenience.replace_all_uses_with(result, new, replace_graph_outputs=True)


def with_nothing(graph: ir.Graph, readers: Sequence[ir.Node], value: ir.Value) -> None:
    """Let nodes, in their order in the graph, read for their input `value` the same numbers with `NOTHING` added."""
    name = f"{value.name}_nothing"
    nothing = ir.Value(name=name, const_value=ir.tensor(NOTHING, name=name))
    graph.register_initializer(nothing)
    same = ir.node("Add", [value, nothing], num_outputs=1)
    same.outputs[0].name, same.outputs[0].type, same.outputs[0].shape = f"{value.name}_same", value.type, value.shape
    graph.insert_before(readers[0], same)
    for reader in readers:
        reader.replace_input_with(list(reader.inputs).index(value), same.outputs[0])


def constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def factors_by_channel(node: ir.Node) -> tuple[int, np.ndarray] | None:
    """The input of a product that is a constant (1, channels, 1, 1), and its numbers (channels,); None for another node."""
    if node.op_type != "Mul":
        return None
    numbers = ((place, constant(value)) for place, value in enumerate(node.inputs))
    return next(((place, c.reshape(-1)) for place, c in numbers if c is not None and c.shape == (1, c.size, 1, 1)), None)


def dims(value: ir.Value | None) -> list[int | None]:
    """The sizes of a value, None where one is not fixed; no sizes where nothing is known."""
    if value is None or value.shape is None:
        return []
    return [d if isinstance(d, int) else None for d in value.shape]


def made_by(value: ir.Value | None) -> str:
    node = None if value is None else value.producer()
    return "" if node is None else node.op_type


def remove_dead(graph: ir.Graph) -> None:
    """Nodes and initializers that nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(list(out.consumers()) or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not list(value.consumers()) and not value.is_graph_output():
            del graph.initializers[name]
