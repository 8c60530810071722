"""Sequences and optionals whose members are known from the file, resolved: torch has no such values, and needs none here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from fewbit.onnx_reader.file import reads
from fewbit.onnx_reader.functions import STANDARD_NAMES

MAKES = ("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "Optional")


def without_sequences(model: ModelProto) -> ModelProto:
    """The model with Concat and Identity in place of what joins or takes from sequences that it lists itself, in place.

    A sequence that another node reads, or that is an output, stays, and so does a place that is computed.
    """
    graph, version = model.graph, max((o.version for o in model.opset_import if o.domain in STANDARD_NAMES), default=0)
    if not any(node.op_type in MAKES for node in graph.node):
        return model
    numbers, members, nodes = _numbers(graph), dict[str, list[str]](), list[NodeProto]()
    for node in graph.node:
        nodes += _resolved(node, members, numbers, graph, version) if node.domain in STANDARD_NAMES else [node]
    read = {one.name for one in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if node.op_type not in MAKES or read & {*node.output}:
            kept.append(node)
            read |= {*reads(node)}
    kept = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del graph.node[:]
    graph.node.extend(kept)
    return model


def _numbers(graph: GraphProto) -> Mapping[str, int]:
    """Whole numbers that are stored, by name."""
    stored = [(one.name, one) for one in graph.initializer]
    stored += [(n.output[0], a.t) for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    small = [(name, one) for name, one in stored if not one.external_data and int(np.prod(one.dims)) == 1]
    return {name: int(numpy_helper.to_array(one).item()) for name, one in small if one.data_type in (6, 7)}


def _resolved(
    node: NodeProto, members: dict[str, list[str]], numbers: Mapping[str, int], graph: GraphProto, version: int
) -> list[NodeProto]:  # fmt: skip
    """What stands in place of a node; sequences that it makes are added to `members`."""
    first = next(iter(node.input), "")
    given = members.get(first)
    place = numbers.get(node.input[-1]) if len(node.input) > 1 else None
    attributes = {one.name: one.i for one in node.attribute}
    if node.op_type == "SequenceConstruct" or (node.op_type == "Optional" and first and first not in members):
        members[node.output[0]] = [*node.input]
    elif node.op_type == "SequenceEmpty":
        members[node.output[0]] = []
    elif node.op_type == "SequenceInsert" and given is not None and (len(node.input) == 2 or place is not None):
        at = len(given) if len(node.input) == 2 or place is None else place
        members[node.output[0]] = [*given[:at], node.input[1], *given[at:]]
    elif node.op_type == "OptionalGetElement" and given is not None and len(given) == 1:
        return [helper.make_node("Identity", given, node.output, node.name)]
    elif node.op_type == "SequenceAt" and given is not None and place is not None and -len(given) <= place < len(given):
        return [helper.make_node("Identity", [given[place]], node.output, node.name)]
    elif node.op_type == "ConcatFromSequence" and given:
        return _joined(node, given, attributes, graph, version)
    return [node]


def _joined(
    node: NodeProto, given: list[str], attributes: Mapping[str, int], graph: GraphProto, version: int
) -> list[NodeProto]:  # fmt: skip
    axis, own = attributes["axis"], node.output[0]
    if not attributes.get("new_axis", 0):
        return [helper.make_node("Concat", given, node.output, node.name, axis=axis)]
    names, axes = [f"{own}_{i}_apart" for i in range(len(given))], f"{own}_axis"
    if version >= 13:
        graph.initializer.append(numpy_helper.from_array(np.array([axis]), axes))
        apart = [helper.make_node("Unsqueeze", [one, axes], [to], to) for one, to in zip(given, names, strict=True)]
    else:
        apart = [helper.make_node("Unsqueeze", [one], [to], to, axes=[axis]) for one, to in zip(given, names, strict=True)]
    return [*apart, helper.make_node("Concat", names, node.output, node.name, axis=axis)]
