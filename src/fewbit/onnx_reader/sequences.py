"""Sequences and optionals whose members are known from the file, resolved: torch has no such values, and needs none here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from fewbit.onnx_reader.file import reads
from fewbit.onnx_reader.functions import STANDARD_NAMES

MAKES = ("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SplitToSequence", "Optional")
FEW = 1024  # numbers of a constant that may say where a tensor is split


def without_sequences(model: ModelProto) -> ModelProto:
    """The model with Split, Concat and Identity in place of what makes, joins or takes from sequences that it lists itself, in
    place.

    A sequence that another node reads, or that is an output, stays, and so does a place that is computed.
    """
    graph, version = model.graph, max((o.version for o in model.opset_import if o.domain in STANDARD_NAMES), default=0)
    if not any(node.op_type in MAKES for node in graph.node):
        return model
    known = _Known(model)
    members, nodes = dict[str, list[str]](), list[NodeProto]()
    for node in graph.node:
        nodes += _resolved(node, members, known, graph, version) if node.domain in STANDARD_NAMES else [node]
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


class _Known:
    """Whole numbers that are stored in a model, and the shapes that onnx infers, where they are asked for."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        stored = [(one.name, one) for one in model.graph.initializer]
        for node in model.graph.node:
            stored += [(node.output[0], a.t) for a in node.attribute if node.op_type == "Constant" and a.name == "value"]
        small = [(name, one) for name, one in stored if not one.external_data and int(np.prod(one.dims)) <= FEW]
        self.stored = {name: numpy_helper.to_array(one) for name, one in small if one.data_type in (6, 7)}
        self.shapes: dict[str, list[int]] | None = None

    def number(self, name: str) -> int | None:
        array = self.stored.get(name)
        return int(array.item()) if array is not None and array.size == 1 else None

    def size(self, name: str, axis: int) -> int:
        """The size of a tensor along an axis; 0 where it is not known."""
        if self.shapes is None:
            graph = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
            values = [v for v in (*graph.input, *graph.value_info) if v.type.tensor_type.HasField("shape")]
            self.shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        shape = self.shapes.get(name, [])
        return shape[axis] if -len(shape) <= axis < len(shape) else 0


def _resolved(
    node: NodeProto, members: dict[str, list[str]], known: _Known, graph: GraphProto, version: int
) -> list[NodeProto]:  # fmt: skip
    """What stands in place of a node; sequences that it makes are added to `members`."""
    first = next(iter(node.input), "")
    given = members.get(first)
    place = known.number(node.input[-1]) if len(node.input) > 1 else None
    attributes = {one.name: one.i for one in node.attribute}
    inside = given is not None and place is not None and -len(given) <= place < len(given)
    if node.op_type == "SequenceConstruct" or (node.op_type == "Optional" and first and first not in members):
        members[node.output[0]] = [*node.input]
    elif node.op_type == "SequenceEmpty":
        members[node.output[0]] = []
    elif node.op_type == "SplitToSequence" and (parts := _parts(node, known, attributes.get("axis", 0))):
        members[node.output[0]] = names = [f"{node.output[0]}_{i}_part" for i in range(len(parts))]
        return [node, *_split(node, names, parts, attributes, graph, version)]
    elif node.op_type == "SequenceInsert" and given is not None and (len(node.input) == 2 or place is not None):
        at = len(given) if len(node.input) == 2 or place is None else place
        members[node.output[0]] = [*given[:at], node.input[1], *given[at:]]
    elif node.op_type == "SequenceErase" and given and (len(node.input) == 1 or inside):
        at = range(len(given))[-1 if place is None else place]
        members[node.output[0]] = [*given[:at], *given[at + 1 :]]
    elif node.op_type == "SequenceLength" and given is not None:
        return [helper.make_node("Constant", [], node.output, node.name, value=numpy_helper.from_array(np.array(len(given))))]
    elif node.op_type == "OptionalGetElement" and given is not None and len(given) == 1:
        return [helper.make_node("Identity", given, node.output, node.name)]
    elif node.op_type == "SequenceAt" and given is not None and place is not None and inside:
        return [helper.make_node("Identity", [given[place]], node.output, node.name)]
    elif node.op_type == "ConcatFromSequence" and given:
        return _joined(node, given, attributes, graph, version)
    return [node]


def _parts(node: NodeProto, known: _Known, axis: int) -> Sequence[int]:
    """The sizes of what SplitToSequence makes; none where the file does not say them."""
    split = known.stored.get(node.input[1]) if len(node.input) > 1 and node.input[1] else np.array(1)
    if split is None:
        return ()
    if split.ndim:
        return [int(n) for n in split]
    size, each = known.size(node.input[0], axis), int(split)
    return [min(each, size - start) for start in range(0, size, each)] if each > 0 else ()


def _split(
    node: NodeProto, names: Sequence[str], parts: Sequence[int], attributes: Mapping[str, int], graph: GraphProto, version: int
) -> list[NodeProto]:  # fmt: skip
    """The nodes that make the parts; pieces of one lose the axis where `keepdims` is 0."""
    axis, own = attributes.get("axis", 0), node.output[0]
    single = len(node.input) < 2 or not node.input[1]
    drops = single and not attributes.get("keepdims", 1)
    apart = [f"{name}_kept" for name in names] if drops else names
    nodes = []
    if version >= 13:
        graph.initializer.append(numpy_helper.from_array(np.array(parts), f"{own}_parts"))
        nodes.append(helper.make_node("Split", [node.input[0], f"{own}_parts"], apart, f"{own}_split", axis=axis))
    else:
        nodes.append(helper.make_node("Split", [node.input[0]], apart, f"{own}_split", axis=axis, split=parts))
    if drops and version >= 13:
        graph.initializer.append(numpy_helper.from_array(np.array([axis]), f"{own}_axis"))
        nodes += [helper.make_node("Squeeze", [one, f"{own}_axis"], [to], to) for one, to in zip(apart, names, strict=True)]
    elif drops:
        nodes += [helper.make_node("Squeeze", [one], [to], to, axes=[axis]) for one, to in zip(apart, names, strict=True)]
    return nodes


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
