"""The tail of the file that went in, behind the nodes of a file that is written."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from fewbit.core.graph import Tail


def with_tail(model: ir.Model, tail: Tail | None) -> ir.Model:
    """A written model with the tail's nodes behind its own, so that it gives what the file that went in gives, in place."""
    if tail is None:
        return model
    graph, behind = model.graph, ir.from_proto(onnx.load_model_from_string(tail.model))
    ports = {port.name: port for port in (*graph.inputs, *graph.outputs)}
    read = {port.name for port in behind.graph.inputs}
    _rename(graph, {name for name in tail.gives if name not in read}, behind)
    results = [ports.get(port.name, port) for port in behind.graph.outputs]
    behind.graph.outputs.clear()
    for port in behind.graph.inputs:
        ir.convenience.replace_all_uses_with(port, ports[port.name])
    nodes, stored = list(behind.graph), list(behind.graph.initializers.values())
    behind.graph.initializers.clear()
    behind.graph.remove(nodes)
    for value in stored:
        graph.register_initializer(value)
    graph.extend(nodes)
    graph.outputs.clear()
    graph.outputs.extend(results)
    model.opset_imports.update({name: version for name, version in behind.opset_imports.items() if name})
    return model


def _rename(graph: ir.Graph, fixed: set[str | None], behind: ir.Model) -> None:
    """Other names where both have one: for values and nodes of the tail, and for values that are called like its outputs."""
    for value in _values(graph):
        if value.name in fixed:
            value.name = f"{value.name}_inside"
    values, nodes = {value.name for value in _values(graph)}, {node.name for node in graph}
    ports = {port.name for port in (*behind.graph.inputs, *behind.graph.outputs)}
    for value in _values(behind.graph):
        if value.name in values and value.name not in ports:
            value.name = _free(f"{value.name}_behind", values | ports)
    for node in RecursiveGraphIterator(behind.graph):
        if node.name in nodes:
            node.name = _free(f"{node.name}_behind", nodes)


def _free(name: str, taken: set[str | None]) -> str:
    while name in taken:
        name += "_"
    return name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """The values of a graph and of the graphs in its nodes that are no inputs of it."""
    yield from graph.initializers.values()
    for node in RecursiveGraphIterator(graph):
        yield from node.outputs
        for attribute in node.attributes.values():
            for inner in [attribute.value] if attribute.type == ir.AttributeType.GRAPH else ():
                yield from (*inner.inputs, *inner.initializers.values())
