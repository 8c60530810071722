"""The float network of a file in Q/DQ form: its Q/DQ nodes taken out, stored codes as the numbers that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fewbit.errors import BadModel
from fewbit.onnx_reader.file import array_of, opsets, reads, title

PAIR = ("QuantizeLinear", "DequantizeLinear")
MOVES = (  # what may stand between the two: it gives of codes what it gives of numbers
    "Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
DRAWS = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
CODES = (np.uint8, np.int8, np.uint16, np.int16)
Arrays = dict[str, np.ndarray]


def stripped(model: ModelProto, path: Path) -> ModelProto:
    """The model without QuantizeLinear and DequantizeLinear. Raises BadModel where it computes with codes, or has none.

    A Clip takes the place of each QuantizeLinear, because tools leave out a Relu or Clip that its range stands for. Codes that
    nodes unpack from packed ones are computed first.
    """
    graph, arrays = model.graph, _stored(model, path.parent)
    unpacking = _before_codes(model, arrays)
    arrays |= _computed(unpacking, model, arrays)
    if not any(node.op_type in PAIR for node in graph.node):
        raise BadModel(f"{path} holds no QuantizeLinear or DequantizeLinear: it is a float file. Leave out --requantize.")
    outputs, codes = {port.name for port in graph.output}, {name for name, value in arrays.items() if value.dtype.kind != "f"}
    names: dict[str, str] = {}
    nodes, running = list[NodeProto](), set[str]()  # the latter: codes of activations
    for node in graph.node:
        of_codes = bool(running & {*node.input})
        if node.op_type not in PAIR:
            if of_codes and node.op_type not in MOVES:
                raise BadModel(f"node '{title(node)}' ({node.op_type}) of {path} computes with codes; give the float file.")
            running |= {*node.output} if of_codes else set()
            nodes.append(node)
            continue
        (result,), first = node.output, node.input[0]
        if node.op_type == "DequantizeLinear" and first in codes:
            graph.initializer.append(numpy_helper.from_array(_numbers(node, [arrays[n] for n in node.input]), result))
        elif node.op_type == "DequantizeLinear" and not of_codes:
            raise BadModel(f"node '{title(node)}' of {path} reads codes that no QuantizeLinear writes; give the float file.")
        elif node.op_type == "QuantizeLinear" and first not in arrays:
            nodes.append(_clip(node, [arrays.get(n) for n in node.input[1:]], model, path))
        elif result in outputs:
            nodes.append(helper.make_node("Identity", [first], [result], name=title(node)))
        else:
            names[result] = first
        running |= {result} if node.op_type == "QuantizeLinear" else set()
    for node in nodes:
        node.input[:] = [_followed(name, names) for name in node.input]
    kept = _read_by_others(nodes, unpacking, outputs)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)
    return model


def _before_codes(model: ModelProto, arrays: Arrays) -> list[NodeProto]:
    """The nodes, in order, that make of stored arrays alone what a DequantizeLinear reads."""
    known, makers = {*arrays}, dict[str, NodeProto]()
    for node in model.graph.node:
        if node.op_type not in (*PAIR, *DRAWS) and known.issuperset(reads(node)):
            known |= {*node.output}
            makers.update(dict.fromkeys(node.output, node))
    wanted = [name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.input]
    found = set[str]()
    while wanted:
        if (name := wanted.pop()) in makers and name not in arrays and name not in found:
            found |= {*makers[name].output}
            wanted += makers[name].input
    return [node for node in model.graph.node if found & {*node.output}]


def _computed(nodes: list[NodeProto], model: ModelProto, arrays: Arrays) -> Arrays:
    """What such nodes give; nothing where onnx has no reference for an operator of theirs."""
    if not nodes:
        return {}
    made = [name for node in nodes for name in node.output if name]
    given = {name for node in nodes for name in reads(node) if name in arrays}
    inputs, outputs = ([helper.make_empty_tensor_value_info(name) for name in names] for names in (given, made))
    try:
        graph = helper.make_graph(nodes, "codes", inputs, outputs)
        run = ReferenceEvaluator(helper.make_model(graph, opset_imports=model.opset_import)).run
        results: Any = run(None, {name: arrays[name] for name in given})
        return dict(zip(made, results, strict=True))
    except Exception:  # what then reads codes from elsewhere is refused by name
        return {}


def _read_by_others(nodes: list[NodeProto], some: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """Nodes without those among `some` whose results nothing reads any more."""
    wanted, kept, doubtful = {*outputs}, list[NodeProto](), {name for node in some for name in node.output}
    for node in reversed(nodes):
        if not doubtful & {*node.output} or wanted & {*node.output}:
            kept.append(node)
            wanted.update(reads(node))
    return kept[::-1]


def _followed(name: str, names: dict[str, str]) -> str:
    while name in names:
        name = names[name]
    return name


def _clip(node: NodeProto, operands: list[np.ndarray | None], model: ModelProto, path: Path) -> NodeProto:
    """A Clip to the numbers that the codes of a QuantizeLinear reach."""
    kind = next((one.i for one in node.attribute if one.name == "output_dtype" and one.i), TensorProto.UINT8)
    absent = np.zeros((), helper.tensor_dtype_to_np_dtype(kind))
    scale, zero = operands[0], operands[1] if len(operands) > 1 else absent
    if scale is None or zero is None or scale.size > 1 or np.asarray(zero).dtype not in CODES:
        raise BadModel(f"node '{title(node)}' of {path} has no fixed scale for all and 8 or 16 bits; give the float file.")
    limits, middle, step = np.iinfo(np.asarray(zero).dtype), int(np.asarray(zero).item()), np.float32(scale.item())
    low, high = (np.float32(step * (end - middle)) for end in (limits.min, limits.max))
    if opsets(model).get("", 0) < 11:
        return helper.make_node("Clip", node.input[:1], node.output, name=title(node), min=float(low), max=float(high))
    ends = [f"{node.output[0]}.low", f"{node.output[0]}.high"]
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), n) for n, v in zip(ends, (low, high), strict=True))
    return helper.make_node("Clip", [node.input[0], *ends], node.output, name=title(node))


def _stored(model: ModelProto, folder: Path) -> Arrays:
    """Initializers and constants by name."""
    arrays = {one.name: array_of(one, folder) for one in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                arrays[node.output[0]] = array_of(attribute.t, folder)
    return arrays


def _numbers(node: NodeProto, operands: list[np.ndarray]) -> np.ndarray:
    """(codes - zero point) times scale, along the node's axis, in blocks where it has some."""
    fields = {attribute.name: attribute.i for attribute in node.attribute}
    codes, scale, *zero = operands
    axis, block = fields.get("axis", 1), fields.get("block_size", 0)

    def along(array: np.ndarray) -> np.ndarray:
        if block:
            return array.repeat(block, axis).take(range(codes.shape[axis]), axis)
        return array.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)]) if array.size > 1 else array

    moved = codes.astype(np.float32) - (along(zero[0].astype(np.float32)) if zero else np.float32(0))
    return (moved * along(scale.astype(np.float32))).astype(np.float32)
