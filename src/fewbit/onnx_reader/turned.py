"""Outputs of a file whose batch is not in front, as (time, batch, letters): the network gives them with the batch in front, and
a tail turns them back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fewbit.core.graph import Turned
from fewbit.onnx_reader.file import inner_nodes, opsets

Size = int | str | None
Sizes = Sequence[Size]
AXES = 13  # the opset from which Unsqueeze and Squeeze read their axes


def place_of_batch(sizes: Sizes, batch: Size) -> int | None:
    """The dimension of an output that is the batch, by its name or its number. None where sizes do not say it."""
    found = [i for i, size in enumerate(sizes) if batch is not None and size == batch]
    return found[0] if found and (found[0] == 0 or len(found) == 1) else None


def turn(model: ModelProto, output: ValueInfoProto, sizes: Sizes, place: int | None, batch: Size) -> None:
    """Put two nodes behind an output, in place: one that puts dimension `place`, the `batch`, in front, None to give it one for
    a batch of one image, and one that undoes that.
    """
    graph, name = model.graph, output.name
    inside, rows = _free(graph, f"{name}_inside"), _free(graph, f"{name}_rows")
    for node in graph.node:
        for one in (node, *inner_nodes(node)):
            for names in (one.input, one.output):
                names[:] = [inside if found == name else found for found in names]
    first, second = _nodes(model, (inside, rows, name), len(sizes), place)
    graph.node.extend([first, second])
    dims = [batch, *(size for i, size in enumerate(sizes) if i != place)]
    graph.value_info.append(helper.make_tensor_value_info(rows, output.type.tensor_type.elem_type or TensorProto.FLOAT, dims))


def _nodes(model: ModelProto, names: tuple[str, str, str], rank: int, place: int | None) -> list[NodeProto]:
    """What turns, and what turns back: between the value inside, the one by rows, and the output."""
    inside, rows, name = names
    if place is not None:
        order = [place, *(i for i in range(rank) if i != place)]
        back = [order.index(i) for i in range(rank)]
        return [
            helper.make_node("Transpose", [inside], [rows], f"{rows}/Transpose", perm=order),
            helper.make_node("Transpose", [rows], [name], f"{name}/Transpose", perm=back),
        ]
    ops = (("Unsqueeze", inside, rows), ("Squeeze", rows, name))
    if opsets(model).get("", AXES) < AXES:
        return [helper.make_node(op, [reads], [gives], f"{gives}/{op}", axes=[0]) for op, reads, gives in ops]
    axes = _free(model.graph, f"{name}_axes")
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), axes))
    return [helper.make_node(op, [reads, axes], [gives], f"{gives}/{op}") for op, reads, gives in ops]


def turned(model: ModelProto) -> dict[str, Turned]:
    """Outputs of a tail that hold what it reads with the batch elsewhere, by what they hold."""
    reads, gives = ({one.name for one in ports} for ports in (model.graph.input, model.graph.output))
    found = dict[str, Turned]()
    for node in model.graph.node:
        if node.op_type in ("Transpose", "Squeeze") and node.input[0] in reads and node.output[0] in gives:
            back = next((list(one.ints) for one in node.attribute if one.name == "perm"), [])
            found[node.input[0]] = Turned(node.output[0], tuple(back.index(i) for i in range(len(back))))
    return found


def _free(graph: GraphProto, name: str) -> str:
    taken = {n for node in graph.node for one in (node, *inner_nodes(node)) for n in (*one.input, *one.output)}
    taken |= {one.name for one in (*graph.input, *graph.output, *graph.initializer)}
    while name in taken:
        name += "_"
    return name
