"""Inputs and outputs as the file that went in has them, so that the file that comes out takes its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from fewbit.core.graph import Port
from fewbit.core.inputs import PLACES

BATCH = "batch"  # what torch.onnx calls the batch; sizes that are free are called as in PLACES


def set_ports(graph: ir.Graph, ports: Sequence[Port], image: str) -> None:
    """Give inputs and outputs the types and the names of dimensions of `ports`, in place; the input `image` says what
    the batch is called.

    A Cast stands where a type is not what the graph computes in. Sizes that the graph has fixed stay, and numbers that would be
    bfloat16, which onnxruntime and openvino take from no numpy array, are float32.
    """
    types = {port.name: port.type for port in ports if port.type != ir.DataType.BFLOAT16}
    images = next((port for port in ports if port.name == image), None)
    if images is None:
        return
    names: dict[str | None, int | str | None] = dict(zip((BATCH, *PLACES), images.dims, strict=True))
    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_called(dim, names) for dim in value.shape])
    dims = {port.name: port.dims for port in ports}
    for value in graph.outputs:  # sizes that follow from free ones
        written = dims.get(value.name or "", ())
        if value.shape is not None and len(value.shape) == len(written):
            pairs = zip(value.shape, written, strict=True)
            value.shape = ir.Shape([d if isinstance(d, int) or isinstance(n, int) else ir.SymbolicDim(n) for d, n in pairs])
    for side, cast in ((graph.inputs, _read_as), (graph.outputs, _written_as)):
        for i, value in enumerate(side):
            dtype = types.get(value.name or "")
            if dtype is not None and dtype != value.dtype:
                side[i] = cast(graph, value, ir.DataType(dtype))


def _called(dim: int | ir.SymbolicDim, names: Mapping[str | None, int | str | None]) -> int | ir.SymbolicDim:
    """A dimension under the name that it has in the file that went in."""
    if not isinstance(dim, ir.SymbolicDim) or dim.value not in names:
        return dim
    name = names[dim.value]
    return ir.SymbolicDim(name if isinstance(name, str) else None)


def _read_as(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """An input of another type in the place of `value`, with a Cast behind it."""
    taken = ir.Value(name=value.name, type=ir.TensorType(dtype), shape=value.shape)
    assert value.dtype is not None
    cast = ir.node("Cast", [taken], {"to": value.dtype.value}, num_outputs=1, name=f"{value.name}.Cast")
    inside = cast.outputs[0]
    inside.name, inside.type, inside.shape = f"{value.name}_inside", value.type, value.shape
    graph.insert_before(graph[0], cast)
    ir.convenience.replace_all_uses_with(value, inside)
    return taken


def _written_as(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """An output of another type in the place of `value`, which a Cast reads."""
    cast = ir.node("Cast", [value], {"to": dtype.value}, num_outputs=1, name=f"{value.name}.Cast")
    given = cast.outputs[0]
    given.name, given.type, given.shape = value.name, ir.TensorType(dtype), value.shape
    value.name = f"{value.name}_inside"
    graph.append(cast)
    return given
