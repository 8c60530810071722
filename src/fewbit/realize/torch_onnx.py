"""A graph of aten calls and Q/DQ ops as an ONNX model, by torch.onnx, the same bytes for the same graph on every machine."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript import opset21
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from fewbit.capture.sites import path_of
from fewbit.core.fx import aten, calls
from fewbit.core.graph import Graph
from fewbit.core.inputs import PLACES, example, fed
from fewbit.errors import BadModel
from fewbit.load.contexts import quiet
from fewbit.realize.chosen import keep_mark
from fewbit.realize.ports import BATCH, set_ports
from fewbit.realize.program import program_of
from fewbit.realize.quick import quick

OF_SHAPES = {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv}
POOL = aten.adaptive_avg_pool2d.default


@torch.library.custom_op("fewbit::dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Codes (inputs, outputs), no zero points, times the scales (inputs / block, outputs), or (outputs,) where block is 0."""
    return codes.to(torch.float32) * (scale.repeat_interleave(block, 0) if block else scale)


@dequantize.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    return torch.empty(codes.shape, dtype=torch.float32)


def _blocked(codes: Any, scale: Any, block: int) -> Any:
    """The ONNX form of `fewbit::dequantize`."""
    if block:
        return opset21.DequantizeLinear(codes, scale, axis=0, block_size=block)
    return opset21.DequantizeLinear(codes, scale, axis=1)


def _sorted(x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """The ONNX form of `aten.sort`: of equal numbers TopK, too, gives the first one first."""
    place: Any = op.Constant(value_ints=[dim])
    return op.TopK(x, op.Gather(op.Shape(x), place), axis=dim, largest=int(descending))


def _shifted_left(x: Any, places: Any) -> Any:
    """The ONNX form of `aten.__lshift__`; onnx's BitShift takes numbers without a sign alone."""
    return op.Mul(x, _power_of_two(places, x))


def _shifted_right(x: Any, places: Any) -> Any:
    """The ONNX form of `aten.__rshift__`: rounded down, also below zero."""
    power = _power_of_two(places, x)
    return op.Div(op.Sub(x, op.Mod(x, power)), power)


def _power_of_two(places: Any, like: Any) -> Any:
    two: Any = op.Constant(value_int=2)
    return op.Pow(op.CastLike(two, like), op.CastLike(places, like))


def _product(x: Any, dims: Any, *, output_dtype: int | None = None) -> Any:
    """The ONNX form of `prims.prod`, which a cumulated product becomes."""
    axes: Any = op.Constant(value_ints=list(dims))
    return op.ReduceProd(x, axes, keepdims=0)


def _recurrent(
    activation: str, x: Any, hx: Any, params: Any, has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """The ONNX form of `aten.rnn_tanh` and `aten.rnn_relu`, one RNN for each layer; torch.onnx writes every step of time."""
    ways, each = 2 if bidirectional else 1, 4 if has_biases else 2
    first: Any = op.Constant(value_ints=[0])
    states = list[Any]()
    x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    for layer in range(num_layers):
        of_ways = [params[i * each : (i + 1) * each] for i in range(layer * ways, (layer + 1) * ways)]
        w, r = (op.Concat(*(op.Unsqueeze(one[i], first) for one in of_ways), axis=0) for i in (0, 1))
        both = (op.Unsqueeze(op.Concat(one[2], one[3], axis=0), first) for one in of_ways if has_biases)
        b = op.Concat(*both, axis=0) if has_biases else None
        start: Any = op.Constant(value_ints=[layer * ways])
        end: Any = op.Constant(value_ints=[(layer + 1) * ways])
        y, last = op.RNN(
            x, w, r, b, None, op.Slice(hx, start, end, first), activations=[activation] * ways, hidden_size=hx.shape[2],
            direction="bidirectional" if bidirectional else "forward",
        )  # fmt: skip
        states.append(last)
        joined: Any = op.Constant(value_ints=[0, 0, -1])
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), joined)
    return op.Transpose(x, perm=[1, 0, 2]) if batch_first else x, op.Concat(*states, axis=0)


def _rnn_tanh(*given: Any) -> tuple[Any, Any]:
    return _recurrent("Tanh", *given)


def _rnn_relu(*given: Any) -> tuple[Any, Any]:
    return _recurrent("Relu", *given)


DECOMPOSE = ExportedProgram.run_decompositions


def _decomposed(program: ExportedProgram, table: Any = None) -> ExportedProgram:
    """The program after `run_decompositions`, or as it is where no node seems to need that: it traces everything anew, in more
    than half of torch.onnx's time.
    """
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    overloads = [target for target in targets if isinstance(target, torch._ops.OpOverload)]
    others = targets.difference(overloads, OF_SHAPES)
    if others or table is None or any(one in table or one._schema.is_mutable for one in overloads):
        return DECOMPOSE(program, table)
    return program


def _exported(module: GraphModule, args: tuple[Any, ...], shapes: Any, **options: Any) -> Any:
    """`torch.onnx.export` without another trace and decompositions; as it is where that fails, to say what is wrong."""
    try:
        with patch.object(ExportedProgram, "run_decompositions", _decomposed), quick():
            program = program_of(module, args, shapes) or module
            return torch.onnx.export(program, args, dynamic_shapes=shapes, **options)
    except Exception:
        return torch.onnx.export(module, args, dynamic_shapes=shapes, **options)


def to_onnx(module: GraphModule, graph: Graph, opset: int) -> ir.Model:
    """torch.onnx's model with fixed names and without records of this machine, so that the same plan gives the same bytes."""
    pools = calls(module.graph, POOL)  # torch.onnx makes ReduceMean of them, which has no integer kernel
    translations: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.fewbit.dequantize.default: _blocked,
        aten.sort.stable: _sorted,
        aten.__lshift__.Tensor: _shifted_left,
        aten.__rshift__.Tensor: _shifted_right,
        torch.ops.prims.prod.default: _product,
        aten.rnn_tanh.input: _rnn_tanh,
        aten.rnn_relu.input: _rnn_relu,
    }
    if all(list(cast("list[int]", pool.args[1])) == [1, 1] for pool in pools):
        translations[POOL] = lambda x, size: op.GlobalAveragePool(x)
    inputs = graph.inputs
    rows: dict[int, Any] = {} if graph.batch else {0: Dim(BATCH, min=1, max=65536)}
    shapes = tuple({**(rows if one.has_batch else {}), **{1 + i: PLACES[i] for i in one.free}} for one in inputs)
    with quiet(), torch.no_grad():
        try:
            program = _exported(
                module, fed(inputs, example(inputs, torch.zeros(graph.at_a_time(2), *graph.input_shape))),
                shapes if any(shapes) else None, dynamo=True, opset_version=opset, verbose=False,
                input_names=[one.name for one in inputs], output_names=[output.name for output in graph.outputs],
                custom_translation_table=translations,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            found = re.search(r"target=torch\.ops\.(\w+\.\w+)", str(error.__cause__))
            raise BadModel(
                f"torch.onnx cannot write {found[1] if found else 'an operator'}{_places(module, found[1] if found else '')}; "
                "write that part of the model with other operators."
            ) from error
    assert program is not None
    model = program.model
    model.producer_name, model.producer_version = "fewbit", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    ports = [*model.graph.inputs, *model.graph.outputs]
    taken = {port.name for port in ports}
    for node in model.graph:
        keep_mark(node)
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value.name in taken and not any(value is port for port in ports):  # a name of the file that went in
                value.name = f"{value.name}_inside"
            if len(node.outputs) > 1 and not list(value.consumers()) and not value.is_graph_output():
                value.shape, value.type = None, None  # torch.onnx gives what nobody reads the shape of its neighbour
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    set_ports(model.graph, graph.ports, graph.input_name)
    return model


def _places(module: GraphModule, name: str) -> str:
    """Where an operator stands in the model, which torch may have opened: aten._cdist_forward is of aten.cdist."""
    plain = name.rpartition(".")[2].strip("_").removesuffix("_forward")
    nodes = [node for node in module.graph.nodes if plain and str(node.target).split(".")[1:2] == [plain]]
    found = ", ".join(dict.fromkeys(path_of(node) or "forward itself" for node in nodes))
    return f", which is in {found}" if found else ""
