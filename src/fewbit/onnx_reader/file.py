"""An ONNX file on disk: what it must be, its graph as nodes, its weights as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, numpy_helper

from fewbit.core.record import MADE
from fewbit.errors import BadFile, BadModel
from fewbit.folder import TWIN
from fewbit.onnx_reader.functions import STANDARD_NAMES, without_functions
from fewbit.onnx_reader.module import Branch
from fewbit.onnx_reader.values import REAL, Node

OLDEST = 7  # what an operator meant before is lifted by onnx's converter
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits")


def read_proto(path: Path, change: Callable[[ModelProto, Path], ModelProto] = lambda model, _: model) -> ModelProto:
    """The model of a file after a change, its external weights not read yet. Raises BadFile or BadModel in words."""
    if not path.is_file():
        raise BadFile(f"{path} does not exist; MODEL as path.onnx needs a file.")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, RecursionError) as error:
        size = path.stat().st_size
        raise BadFile(
            f"{path} ({size:,} bytes) is not a readable ONNX file: it is cut off, damaged or of another kind. "
            "Export it again: torch.onnx.export(model, (x,), 'model.onnx')."
        ) from error
    if not model.graph.node or not model.opset_import:
        raise BadFile(f"{path} holds no graph of nodes; it is empty or no ONNX file. Export it again with torch.onnx.export.")
    model = without_functions(model, path)
    refuse_names(model.graph, path)
    put_in_order(model.graph)
    refuse_text(model.graph, path)
    model = change(model, path)
    refuse_codes(model, path)
    return model


def put_in_order(graph: GraphProto) -> None:
    """Put each node behind those that write what it reads, as runtimes do when they load a file; those that are stay."""
    writers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    waits = [{writers[name] for name in reads(node) if name in writers} for node in graph.node]
    if all(i > max(before, default=-1) for i, before in enumerate(waits)):
        return
    try:
        order = [*TopologicalSorter(dict(enumerate(waits))).static_order()]
    except CycleError:
        return  # what is wrong with it is said where names are looked at
    nodes = [NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)


def refuse_names(graph: GraphProto, path: Path) -> None:
    """Raise BadModel where a name is that of two values, or an output is an input itself."""
    inputs, stored = [one.name for one in graph.input], {one.name for one in graph.initializer}
    seen = set[str]()
    for name in (*inputs, *(stored - {*inputs}), *(name for node in graph.node for name in node.output if name)):
        if name in seen:
            raise BadModel(
                f"two values of {path} are called '{name}', and no runtime loads it; each needs its own name. Export it again."
            )
        seen.add(name)
    if passed := [one.name for one in graph.output if one.name in inputs]:
        ends = [[one for one in inputs if one not in stored], [one.name for one in graph.output if one.name not in passed]]
        raise BadModel(
            f"output '{passed[0]}' of {path} is its input, as it comes; an output has to be computed. Leave it out: "
            f"onnx.utils.extract_model({str(path)!r}, 'without.onnx', {ends[0]}, {ends[1]})."
        )


def refuse_text(graph: GraphProto, path: Path) -> None:
    """Raise BadModel where an output is not a tensor of numbers but text, a map or a sequence, with the cut in front of it."""
    strange = {one.name for one in graph.output if not _is_of_numbers(one.type)}
    if not strange:
        return
    stored = {one.name for one in graph.initializer}
    inputs, varies = [one.name for one in graph.input if one.name not in stored], set[str]()
    of_text = {one.name for one in graph.initializer if one.data_type == TensorProto.STRING} | strange
    for node in graph.node:
        if {*inputs, *varies} & {*reads(node)}:
            varies |= {*node.output}
        if of_text & {*reads(node)}:
            of_text |= {*node.output} - {one.name for one in graph.output if one.name not in strange}
    ends = [one.name for one in graph.output if one.name not in of_text]
    ends += [name for node in graph.node if of_text & {*node.output} for name in reads(node) if name in varies - of_text]
    raise BadModel(
        f"output '{min(strange)}' of {path} is text, a map or a sequence; tensors of numbers are taken. Cut the file in "
        f"front of it: onnx.utils.extract_model({str(path)!r}, 'front.onnx', {inputs}, {[*dict.fromkeys(ends)]})."
    )


def _is_of_numbers(kind: TypeProto) -> bool:
    return kind.WhichOneof("value") in ("tensor_type", None) and kind.tensor_type.elem_type != TensorProto.STRING


def opsets(model: ModelProto) -> dict[str, int]:
    return {"" if one.domain in STANDARD_NAMES else one.domain: one.version for one in model.opset_import}


def lifted(model: ModelProto, path: Path) -> ModelProto:
    """The model in an opset whose operators are taken."""
    version, newest = opsets(model).get("", 0), onnx.defs.onnx_opset_version()
    if version > newest:
        raise BadModel(
            f"{path} is of opset {version}, whose operators nobody here knows; {OLDEST} to {newest} are taken. Export it again "
            "with such an opset: torch.onnx.export(..., opset_version=18)."
        )
    if version >= OLDEST or not version:
        return model
    try:
        return onnx.version_converter.convert_version(model, 13)
    except Exception as error:
        raise BadModel(
            f"{path} is of opset {version}; {OLDEST} and later are taken, and onnx cannot convert it: {first_line(error)}. "
            "Export it again with a later opset."
        ) from error


def all_nodes(graph: GraphProto) -> Iterable[NodeProto]:
    """The nodes of a graph and of the graphs in its attributes."""
    for node in graph.node:
        yield node
        yield from inner_nodes(node)


def inner_graphs(node: NodeProto) -> Iterable[GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        yield from (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ()))


def inner_nodes(node: NodeProto) -> Iterable[NodeProto]:
    """The nodes of these graphs, and of the graphs in them."""
    for graph in inner_graphs(node):
        yield from all_nodes(graph)


def reads(node: NodeProto) -> list[str]:
    """The names that a node reads, those that its graphs read or give included."""
    nodes = (node, *inner_nodes(node))
    given = (output.name for one in nodes for graph in inner_graphs(one) for output in graph.output)
    return [name for name in (*(name for one in nodes for name in one.input), *given) if name]


def refuse_codes(model: ModelProto, path: Path) -> None:
    """Raise BadModel for a file that is quantized already and for sparse weights, by name."""
    graph = model.graph
    whole = [n for n in all_nodes(graph) if n.op_type in QUANTIZED or n.op_type.startswith(("QLinear", "QGemm", "QAttention"))]
    if whole:
        kinds = ", ".join(sorted({n.op_type for n in whole}))
        raise BadModel(
            f"{path} is quantized already: {len(whole)} nodes ({kinds}), the first is '{title(whole[0])}'. "
            "Give the float file that it was made from; --requantize takes QuantizeLinear and DequantizeLinear out of it."
            f"{of_fewbit(model, path)}"
        )
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise BadModel(f"{path} stores weight '{name}' as a sparse tensor; make it a dense initializer, those are taken.")


def of_fewbit(model: ModelProto, path: Path) -> str:
    """A sentence about the float file of the run where fewbit made this one, to be said behind others; else nothing."""
    if all(entry.key != MADE for entry in model.metadata_props):
        return ""
    twin = path.with_name(TWIN)
    place = f"{twin}, which lies beside it" if twin.is_file() else f"{TWIN}, which lies in its run"
    return f" fewbit made this file from a float one, which can be given in its place: {place}."


def domain(node: NodeProto) -> str:
    return "" if node.domain in STANDARD_NAMES else node.domain


def label(node: NodeProto) -> str:
    return f"{domain(node)}.{node.op_type}" if domain(node) else node.op_type


def title(node: NodeProto) -> str:
    """The node's name, or that of what it writes."""
    return node.name or next((name for name in node.output if name), "")


def constants_of(graph: GraphProto, folder: Path) -> dict[str, np.ndarray]:
    """The weights; those in float16, bfloat16 and float64 as float32. They are taken out of the graph."""
    arrays = {}
    while graph.initializer:
        arrays[graph.initializer[-1].name] = array_of(graph.initializer[-1], folder)
        del graph.initializer[-1]
    return dict(reversed(arrays.items()))


def array_of(proto: TensorProto, folder: Path) -> np.ndarray:
    """The numbers of a tensor, real ones in float32."""
    if proto.data_type == TensorProto.STRING:
        raise BadModel(f"tensor '{proto.name}' holds text; tensors of numbers are taken. Leave out what is made of it.")
    array = raw_array(proto, folder)
    return array.astype(np.float32) if array.dtype in REAL else array


def raw_array(proto: TensorProto, folder: Path) -> np.ndarray:
    """The numbers of a tensor in its own type. Raises BadFile for data that is missing, cut off or outside of the folder."""
    is_external = proto.data_location == TensorProto.EXTERNAL
    try:
        return _external(proto, folder) if is_external else numpy_helper.to_array(proto)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadFile(
            f"tensor '{proto.name}' of shape {tuple(proto.dims)} cannot be read: {first_line(error)}. Export the file again."
        ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _external(proto: TensorProto, folder: Path) -> np.ndarray:
    fields = {entry.key: entry.value for entry in proto.external_data}
    where = fields.get("location", "")
    file = (folder / where).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise BadFile(f"tensor '{proto.name}' lies in {where}, outside of {folder}; external data belongs beside its file.")
    if not file.is_file():
        raise BadFile(f"tensor '{proto.name}' lies in {file}, which does not exist; copy the external data beside its file.")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    count = int(np.prod(proto.dims, dtype=np.int64))
    start, size = int(fields.get("offset", 0)), file.stat().st_size
    needed = count * dtype.itemsize
    if start < 0 or start + needed > size:
        raise BadFile(
            f"tensor '{proto.name}' needs {needed:,} bytes from byte {start:,} of {file}, which has {size:,}: it is cut off. "
            "Copy it again."
        )
    return np.fromfile(file, dtype=dtype, count=count, offset=start).reshape(tuple(proto.dims))


def nodes_of(graph: GraphProto, versions: Mapping[str, int], folder: Path, batch: int | None) -> list[Node]:
    """The nodes of a graph in order, Constant nodes among them."""
    return [
        Node(
            title(n), n.op_type, domain(n), versions.get(domain(n), 1), tuple(n.input), tuple(n.output),
            {a.name: attribute(a, versions, folder, batch) for a in n.attribute}, batch,
        )
        for n in graph.node
    ]  # fmt: skip


def attribute(proto: AttributeProto, versions: Mapping[str, int], folder: Path, batch: int | None) -> Any:
    if proto.type == AttributeProto.GRAPH:
        nodes, constants = split_constants(nodes_of(proto.g, versions, folder, batch))
        constants |= constants_of(proto.g, folder)
        return Branch(tuple(nodes), constants, tuple(o.name for o in proto.g.output))
    if proto.type == AttributeProto.TENSOR:
        return array_of(proto.t, folder)
    value = onnx.helper.get_attribute_value(proto)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [one.decode("utf-8", "replace") if isinstance(one, bytes) else one for one in value]
    return value


def split_constants(nodes: Sequence[Node]) -> tuple[list[Node], dict[str, np.ndarray]]:
    """The nodes without the Constant ones, and these as arrays."""
    arrays: dict[str, np.ndarray] = {}
    for node in nodes:
        if node.op == "Constant" and node.domain == "":
            (key, value), *_ = node.attributes.items()
            if key not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
                raise BadModel(f"node {node} holds text or a sparse tensor; numbers are taken.")
            arrays[node.outputs[0]] = np.asarray(value, dtype=np.float32 if key.startswith("value_f") else None)
    return [n for n in nodes if n.op != "Constant" or n.domain], arrays
