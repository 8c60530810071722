"""A file whose last nodes torch cannot express (NonMaxSuppression, Loop, an If that the image decides), in two: the part with
the layers, and the tail behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fewbit.core.graph import Tail
from fewbit.errors import BadModel
from fewbit.onnx_reader.file import domain, first_line, inner_nodes, label, opsets, raw_array, reads, title
from fewbit.onnx_reader.known_shapes import NOTHING, Shapes, dims_of, known_sizes, shapes_of, without_numbers
from fewbit.onnx_reader.module import WEIGHTED
from fewbit.onnx_reader.operators import CONTROL, OPERATORS
from fewbit.onnx_reader.recurrent import unusual
from fewbit.onnx_reader.turned import Size, Sizes, place_of_batch, turn, turned
from fewbit.onnx_reader.work import products

# What chooses by its numbers: with rounding it chooses otherwise, so where it serves a tail alone it belongs to it.
CHOOSES = ("ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "TopK")
LAYOUTS = ("com.microsoft.nchwc", "com.ms.internal.nhwc")  # domains of onnxruntime's last optimisations
WHY = {True: "belongs to such a node", False: "torch cannot express it"}
TURNS = "puts the batch where the file has it"
STATED = ("Shape", "Size")  # what they write depends on no number of the image


def cut(model: ModelProto, path: Path) -> tuple[ModelProto, Tail | None]:
    """The model without the nodes that nobody reads and those that stay as they are, and the latter as its tail, where there
    are any.

    What the tail reads are outputs of the model then. Raises BadModel, with the node's name, where nodes that are not
    taken stand in front of layers, or are laid out for one processor.
    """
    flow = Flow(model)
    strange = [i for i, node in enumerate(flow.nodes) if not flow.is_taken(node)]
    _refuse_layouts([flow.nodes[i] for i in strange], path)
    tail = _tail(flow, strange, path)
    if behind := _turned(model, flow, tail):
        flow = Flow(model)
        tail |= {flow.maker[name] for name in behind}
    if not tail:
        if len(flow.nodes) < len(model.graph.node):
            read = [NodeProto.FromString(node.SerializeToString()) for node in flow.nodes]
            del model.graph.node[:]
            model.graph.node.extend(read)
        return model, None
    shapes = shapes_of(model)
    tail = _with_whole_batches(flow, tail, shapes)
    file = _file(flow, tail, shapes, path.parent)
    return _without(flow, tail, shapes), file


class Flow:
    """The nodes of a model by their places, and what flows between them."""

    def __init__(self, model: ModelProto) -> None:
        self.model, self.nodes = model, list(_read(model.graph))
        self.reads = [reads(node) for node in self.nodes]
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.stored = {one.name for one in model.graph.initializer}
        self.inputs = {one.name: one for one in model.graph.input if one.name not in self.stored}
        self.varies = {*self.inputs}  # the names of what depends on the numbers of an input
        for node, read in zip(self.nodes, self.reads, strict=True):
            if node.op_type not in STATED and self.varies & {*read}:
                self.varies |= {*node.output}
        self.layers = {
            i for i, node in enumerate(self.nodes) for one in (node, *inner_nodes(node))
            if one.op_type in WEIGHTED and not self.varies & {*one.input[1:2]}
        }  # fmt: skip

    def is_taken(self, node: NodeProto) -> bool:
        """Whether torch expresses a node: all of its operators are in the tables, and no number of the image decides."""
        known = all(
            (one.op_type in OPERATORS.get(domain(one), {}) or (not domain(one) and one.op_type in CONTROL)) and not unusual(one)
            for one in (node, *inner_nodes(node))
        )
        return known and not (node.op_type == "If" and node.input[0] in self.varies)

    def behind(self, start: Collection[int]) -> set[int]:
        """Some nodes and all that depend on them."""
        found, written = set[int](), set[str]()
        for i, node in enumerate(self.nodes):
            if i in start or written & {*self.reads[i]}:
                found.add(i)
                written |= {*node.output}
        return found

    def in_front(self, names: Iterable[str]) -> set[int]:
        """The nodes that some values depend on."""
        found, waiting = set[int](), [self.maker[name] for name in names if name in self.maker]
        while waiting:
            i = waiting.pop()
            if i not in found:
                found.add(i)
                waiting += [self.maker[name] for name in self.reads[i] if name in self.maker]
        return found


def _read(graph: GraphProto) -> Iterable[NodeProto]:
    """The nodes of a graph that its outputs depend on."""
    names, nodes = {one.name for one in graph.output}, []
    for node in reversed(graph.node):
        if names & {*node.output}:
            nodes.append(node)
            names |= {*reads(node)}
    return reversed(nodes)


def _refuse_layouts(strange: Sequence[NodeProto], path: Path) -> None:
    """Raise BadModel where onnxruntime has laid a file out for a processor, with how to save it before that."""
    found = [node for node in strange if domain(node) in LAYOUTS or node.op_type.startswith("Nhwc")]
    if found:
        raise BadModel(
            f"{path} was saved by onnxruntime with all of its optimisations, which lay it out for one kind of processor: "
            f"{len(found)} nodes such as {label(found[0])} '{title(found[0])}'. Give the file that it was made from, or save "
            "that with fewer: options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED."
        )


def _tail(flow: Flow, strange: Sequence[int], path: Path) -> set[int]:
    """The nodes that are not taken, those behind, and what chooses for them alone. Raises BadModel where layers are there."""
    for i in strange:
        behind = flow.behind([i])
        if flow.layers & behind:
            before = flow.layers & flow.in_front(flow.reads[i])
            these = [s for s in strange if s in behind and flow.layers & flow.behind([s])]
            raise BadModel(_refusal(flow, these, path, between=bool(before)))
    tail = flow.behind(strange)
    for i in reversed(range(len(flow.nodes))):
        after = flow.behind([i]) if flow.nodes[i].op_type in CHOOSES else set()
        if after & tail and not after & flow.layers:
            tail |= after
    return tail


def _refusal(flow: Flow, nodes: Sequence[int], path: Path, *, between: bool) -> str:
    """The message about nodes that no tail can hold, with the cut that can be made."""
    named, versions = [flow.nodes[i] for i in nodes], opsets(flow.model)
    said = ", ".join(
        " ".join(filter(None, (f"{label(n)} '{title(n)}' (opset {versions.get(domain(n), 0)})", unusual(n)))) for n in named[:4]
    )
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    message = f"{path} has operators that are not taken, {'between' if between else 'in front of'} its layers: {said}{more}."
    taken = f"{message} docs/onnx.md lists those that are, and those behind the last layer may be others."
    if not between:
        return f"{taken} Cut the file behind them with onnx.utils.extract_model, and give the images that they make."
    ends = _front(flow, flow.behind(nodes), shapes_of(without_numbers(flow.model)))
    return (
        f"{taken} Quantize what stands in front of them: onnx.utils.extract_model({str(path)!r}, 'front.onnx', "
        f"{[*flow.inputs]}, {ends})."
    )


def _front(flow: Flow, behind: set[int], shapes: Shapes) -> list[str]:
    """What the nodes in front of others give to them, and to the outputs: as far in front as it takes for values that have the
    batch in front and are chosen by no numbers, where shapes say so and layers are left.
    """
    batch, whole = _batch(flow, shapes), set(behind)
    while True:
        more = {
            i for name in _given(flow, whole) if (i := flow.maker.get(name)) is not None
            and (flow.nodes[i].op_type in CHOOSES or dims_of(shapes.get(name, NOTHING))[:1] != [batch])
        }  # fmt: skip
        if not more:
            break
        whole |= flow.behind(more)
    return _given(flow, whole if flow.layers - whole else behind)


def _given(flow: Flow, behind: set[int]) -> list[str]:
    """What some nodes read of those in front of them, and the outputs of the latter."""
    front = {name for i, node in enumerate(flow.nodes) if i not in behind for name in node.output if name in flow.varies}
    ends = [name for i in sorted(behind) for name in flow.reads[i] if name in front]
    return [*dict.fromkeys([*ends, *(one.name for one in flow.model.graph.output if one.name in front)])]


def _batch(flow: Flow, shapes: Shapes) -> int | str | None:
    """What the batch is called, rather than its number."""
    firsts = [dims[0] for name in flow.inputs if len(dims := dims_of(shapes[name])) == 4]
    return next((first for first in sorted(firsts, key=lambda first: isinstance(first, int))), None)


def _turned(model: ModelProto, flow: Flow, tail: Collection[int]) -> list[str]:
    """The outputs in front of a tail whose batch is known to stand elsewhere than in front, turned in place."""
    batch = _batch(flow, flow.inputs)
    waiting = [
        one for one in model.graph.output
        if flow.maker.get(one.name) not in (None, *tail) and one.name in flow.varies
        and (not batch or dims_of(one)[:1] != [batch] or _is_open(dims_of(one), batch))
    ]  # fmt: skip
    if not waiting:
        return []
    light, found = without_numbers(model), list[str]()
    try:
        shapes = shapes_of(light)
        batch = _batch(flow, shapes)
        for output in waiting:
            sizes: Sizes = known_sizes(dims_of(shapes.get(output.name, NOTHING)), dims_of(output), batch)
            place = place_of_batch(sizes, batch)
            if _is_open(sizes, batch):
                tried, _ = _place_by_trial(light, output.name, batch, sizes)
                place = place if tried is None else tried
            elif place is None and not isinstance(batch, int):
                place, sizes = _place_by_trial(light, output.name, batch, sizes)
            if place or (sizes and place is None and batch == 1 and all(isinstance(size, int) for size in sizes)):
                turn(model, output, sizes, place, batch)
                found.append(output.name)
    except onnx.shape_inference.InferenceError:
        pass  # what does not fit together is said where it runs
    return found


def _is_open(sizes: Sizes, batch: Size) -> bool:
    """Whether several dimensions are as large as a fixed batch, as where there are as many steps of time as images."""
    return isinstance(batch, int) and batch > 1 and list(sizes).count(batch) > 1


def _place_by_trial(model: ModelProto, name: str, batch: Size, sizes: Sizes) -> tuple[int | None, Sizes]:
    """The dimension of an output that grows with the batch, as far as shapes follow, tried with two other batches; None where
    none or several do. And its sizes, from what is known of them.
    """
    found, fixed = [], batch if isinstance(batch, int) else 1
    for count in (fixed + 1, fixed + 2):
        trial = ModelProto.FromString(model.SerializeToString())
        del trial.graph.value_info[:]
        for one in trial.graph.output:
            one.type.tensor_type.ClearField("shape")
        for one in trial.graph.input:
            dims = one.type.tensor_type.shape.dim
            if isinstance(batch, int) and len(dims) == 4 and dims[0].dim_value == batch:
                dims[0].dim_value = count
            for dim in dims:
                if dim.dim_value <= 0 and (dim.dim_param == batch or (dim is dims[0] and len(dims) == 4 and not dim.dim_param)):
                    dim.dim_value = count
        found.append(dims_of(shapes_of(trial).get(name, NOTHING)))
    places = [i for i, pair in enumerate(zip(*found, strict=False)) if pair == (fixed + 1, fixed + 2)]
    if len(places) != 1 or len(found[0]) != len(found[1]):
        return None, sizes
    return places[0], [a if a == b else None for a, b in zip(*found, strict=True)]


def _with_whole_batches(flow: Flow, tail: set[int], shapes: Shapes) -> set[int]:
    """The tail from where values are known to have the batch in front; what depends on no number of the image is in it."""
    batch = _batch(flow, shapes)
    while True:
        more = {
            flow.maker[name] for i in tail for name in flow.reads[i]
            if name in flow.maker and (name not in flow.varies or dims_of(shapes.get(name, NOTHING))[:1] != [batch])
        } - tail - flow.layers  # fmt: skip
        if not more:
            return tail
        tail = tail | more


def _ends(flow: Flow, tail: set[int]) -> list[str]:
    """What the tail reads of the nodes in front of it."""
    own = {name for i in tail for name in flow.nodes[i].output}
    return [*dict.fromkeys(n for i in sorted(tail) for n in flow.reads[i] if n in flow.maker and n not in own)]


def _without(flow: Flow, tail: set[int], shapes: Shapes) -> ModelProto:
    """The model without its tail, in place."""
    graph = flow.model.graph
    kept = [one for one in graph.output if flow.maker.get(one.name) not in tail]
    ends = [_info(name, shapes) for name in _ends(flow, tail) if name not in {one.name for one in kept}]
    needed = flow.in_front(one.name for one in (*kept, *ends))
    del graph.node[:], graph.output[:]
    graph.node.extend(node for i, node in enumerate(flow.nodes) if i in needed)
    graph.output.extend([*kept, *ends])
    return flow.model


def _info(name: str, shapes: Shapes) -> ValueInfoProto:
    return shapes[name] if name in shapes else helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _file(flow: Flow, tail: set[int], shapes: Shapes, folder: Path) -> Tail:
    """The tail as a model of its own, its weights inside."""
    graph, nodes = flow.model.graph, [flow.nodes[i] for i in sorted(tail)]
    own, outputs = {name for node in nodes for name in node.output}, {one.name: one for one in graph.output}
    read = dict.fromkeys([*(n for i in sorted(tail) for n in flow.reads[i]), *outputs])
    ports = {**{name: _info(name, shapes) for name in flow.maker}, **outputs, **flow.inputs}
    inputs = [ports[name] for name in read if name in ports and name not in own]
    stored = [_dense(one, folder) for one in graph.initializer if one.name in read]
    model = helper.make_model(
        helper.make_graph(nodes, "tail", inputs, [*outputs.values()], stored), opset_imports=flow.model.opset_import,
        ir_version=flow.model.ir_version,
    )  # fmt: skip
    return tail_of(model)


def _dense(tensor: TensorProto, folder: Path) -> TensorProto:
    return numpy_helper.from_array(raw_array(tensor, folder), tensor.name)


def tail_of(model: ModelProto) -> Tail:
    """A tail from its file."""
    flow, versions, others = Flow(model), opsets(model), turned(model)
    ends = {one.name for one in others.values()}
    rows = (
        {
            "node": title(n),
            "operator": label(n),
            "opset": versions.get(domain(n), 0),
            "why": TURNS if ends & {*n.output} else WHY[flow.is_taken(n)],
        }
        for n in flow.nodes
        if n.op_type != "Constant"
    )
    reads, gives = (tuple(one.name for one in ports) for ports in (model.graph.input, model.graph.output))
    return Tail(model.SerializeToString(deterministic=True), reads, gives, tuple(rows), tuple(products(model)), others)


def first_of(tail: Tail) -> str:
    """The first node that torch cannot express, in words; where there is none, the first."""
    row = next((row for row in tail.nodes if row["why"] == WHY[False]), tail.nodes[0])
    return f"{row['operator']} '{row['node']}' (opset {row['opset']})"


def of_opset(tail: Tail, opset: int, ref: str) -> Tail:
    """The tail in the opset of the files that are written. Raises BadModel where onnx cannot convert it."""
    model = onnx.load_model_from_string(tail.model)
    if opsets(model).get("", opset) == opset:
        return tail
    try:
        found = onnx.version_converter.convert_version(model, opset)
    except Exception as error:
        reason = first_line(error).rpartition("failed: ")[2]
        raise BadModel(
            f"{ref} has nodes that would stay as they are, from {first_of(tail)} on; files of the target are of opset {opset}, "
            f"and onnx cannot convert these: {reason}. Export the file with opset {opset}."
        ) from error
    return replace(tail, model=found.SerializeToString(deterministic=True))
