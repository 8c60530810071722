"""Weights that do not fill their container at their true size: packed uint8 initializers, and ordinary ONNX nodes that give
the int8 or int16 back.

A code minus the lowest of its width is unsigned. It is cut into planes of 8, 4, 2 and 1 bits from the top (6 = 4 + 2), each an
initializer with 1, 2, 4 or 8 neighbours in a byte, the first in the lowest bits. Gather reads the codes of a byte from a table
that all weights share, Add joins the planes. All inputs are constant, so onnxruntime and openvino fold these nodes when they
load the file and run the kernels of int8 weights. (Bitwise nodes would not do: openvino does not fold them.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from fewbit.core.graph import flat_name
from fewbit.core.grid import Grid, multiples_of
from fewbit.core.plan import Plan
from fewbit.errors import Fault

WIDTHS = (8, 4, 2, 1)
SHARED = "unpack."  # how tables and sizes that several weights read begin
MULTIPLE_BITS = 4  # of a multiple, 1 to 16
DEDUPLICATED = 1024  # torch.onnx writes equal tensors of at most so many elements once, under the name of the first


def pack_weights(model: ir.Model, plan: Plan) -> None:
    """Replace the initializers of weights that do not fill their container, in place; the unpacked value takes their name.

    Raises Fault where a weight has no initializer and no other stands for it.
    """
    first = model.graph[0]
    for choice in plan.choices.values():
        if choice.codes is None or choice.role != "weight" or choice.grid.bits in (8, 16):
            continue
        name = flat_name(choice.site)
        initializer = model.graph.initializers.get(name)
        if initializer is None and choice.codes.numel() <= DEDUPLICATED:
            continue
        if initializer is None or initializer.const_value is None:
            raise Fault(f"torch.onnx wrote no initializer {name} for the codes of {choice.site}.", [choice.site])
        times = None
        if choice.grid.multiples:
            times = multiples_of(choice.qparams.scale, choice.grid).t().to(torch.int8).contiguous().numpy()
        model.graph.insert_before(first, _packed(model.graph, initializer, choice.grid, times))


def part_sizes(name: str, shape: Sequence[int], grid: Grid) -> dict[str, int]:
    """Bytes in a file of each part of a weight, by its name, with its header: the codes, what unpacks them, and the tables that
    weights share, which begin with SHARED. `shape` is that of the initializer: (inputs, outputs) for a linear op.
    """
    graph = ir.Graph([], [], nodes=[], name="")
    value = _constant(graph, name, np.zeros(shape, np.int8 if grid.bits <= 8 else np.int16))
    if grid.bits not in (8, 16):
        times = np.ones((shape[0] // grid.group_size, shape[1]), np.int8) if grid.multiples else None
        graph.extend(_packed(graph, value, grid, times))
    written, sizes = ir.to_proto(graph), dict[str, int]()
    for kind in ("initializer", "node", "value_info"):
        for one in getattr(written, kind):
            alone = onnx.GraphProto()
            getattr(alone, kind).append(one)
            sizes[one.name] = sizes.get(one.name, 0) + alone.ByteSize()
    return sizes


def _packed(graph: ir.Graph, initializer: ir.Value, grid: Grid, times: NDArray[np.int8] | None) -> list[ir.Node]:
    """Pack an initializer of codes; what unpacks it, which stands for it. `times` are the multiples of a grid that has some."""
    assert initializer.name is not None
    assert initializer.const_value is not None
    name, codes, low = initializer.name, initializer.const_value.numpy(), Grid(grid.bits, grid.signed).low
    if grid.stored == 4:
        initializer.const_value = ir.tensor(codes, dtype=ir.DataType.INT4, name=name)
        initializer.dtype = ir.DataType.INT4
        return []
    del graph.initializers[name]
    if times is None:
        nodes, unpacked = _unpacking(graph, name, codes, grid.bits, low)
    else:
        nodes, unpacked = _multiplying(graph, name, codes, grid.bits, low, times)
    initializer.replace_all_uses_with(unpacked)
    return nodes


def planes(bits: int) -> Iterator[tuple[int, int]]:
    """(width, how far its lowest bit stands above that of the code) of each plane, from the top."""
    for width in WIDTHS:
        if bits & width:
            bits -= width
            yield width, bits


def packed_plane(offset: NDArray[np.uint16], width: int, above: int) -> NDArray[np.uint8]:
    """The `width` bits from bit `above` on of unsigned codes (8 n,), as bytes (n * width,)."""
    fields = ((offset >> above) & (2**width - 1)).astype(np.uint8).reshape(-1, 8 // width)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(fields << np.arange(0, 8, width, dtype=np.uint8), axis=1)
    return packed


def plane_table(width: int, above: int, low: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """What each byte of a plane adds to the codes of its elements: (256, 8 / width); `low` is the code of all bits 0."""
    fields = (np.arange(256)[:, None] >> np.arange(0, 8, width)) & (2**width - 1)
    table: NDArray[Any] = ((fields << above) + low).astype(dtype)
    return table


def _maker(nodes: list[ir.Node], name: str) -> Callable[..., ir.Value]:
    """What adds a node to a list and gives its result."""

    def node(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes, name=f"{name}.unpack.{len(nodes)}"))
        nodes[-1].outputs[0].name = nodes[-1].name
        return nodes[-1].outputs[0]

    return node


def _multiplying(
    graph: ir.Graph, name: str, codes: NDArray[Any], bits: int, low: int, times: NDArray[np.int8]
) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that compute codes (inputs, outputs) times those of their block (inputs / block, outputs), as int8.

    A byte holds neighbours along the inputs, which are of one block; the table that it is read from has rows for each multiple.
    """
    nodes, base = _unpacking(graph, f"{name}.multiples", times, MULTIPLE_BITS, 1)
    node = _maker(nodes, name)
    (inputs, outputs), blocks = codes.shape, len(times)
    rows = _constant(graph, "unpack.rows", np.array(256, np.int32))  # of a table, for each multiple; runtimes multiply no int8
    base = node("Mul", node("Cast", base, to=int(ir.DataType.INT32)), rows)
    base = node("Reshape", base, _constant(graph, f"unpack.shape.{blocks}x1x{outputs}", np.array([blocks, 1, outputs])))
    offset = (codes.astype(np.int32) - low).astype(np.uint16)
    result: ir.Value | None = None
    for width, above in planes(bits):
        per_byte = 8 // width
        packed = packed_plane(offset.reshape(-1, per_byte, outputs).swapaxes(1, 2).reshape(-1), width, above)
        least = low if result is None else 0
        plane = plane_table(width, above, least, np.dtype(np.int32))
        table = np.concatenate([k * plane for k in range(2**MULTIPLE_BITS + 1)]).astype(np.int8)
        rows_table = _constant(graph, f"unpack.times.bits{width}.above{above}.from{least}", table)
        plane_codes = _constant(graph, f"{name}.bits{width}", packed.reshape(blocks, -1, outputs))
        part = node("Gather", rows_table, node("Add", node("Cast", plane_codes, to=int(ir.DataType.INT32)), base))
        part = node("Transpose", part, perm=[0, 1, 3, 2])
        part = node("Reshape", part, _constant(graph, f"unpack.shape.{inputs}x{outputs}", np.array([inputs, outputs])))
        result = part if result is None else node("Add", result, part)
    assert result is not None
    result.name, result.shape, result.dtype = name, ir.Shape((inputs, outputs)), ir.DataType.INT8
    return nodes, result


def _unpacking(graph: ir.Graph, name: str, codes: NDArray[Any], bits: int, low: int) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that compute `codes` of `bits` from `low` on, and the value: it has their shape and type and is called `name`.

    Every plane becomes (n, 2, 2, 2) for 8 n codes without a Reshape of its own: a byte's codes are the last axes of its table.
    """
    nodes: list[ir.Node] = []
    node = _maker(nodes, name)
    offset = np.zeros(-(-codes.size // 8) * 8, np.uint16)
    offset[: codes.size] = (codes.reshape(-1).astype(np.int32) - low).astype(np.uint16)
    kind = codes.dtype if codes.dtype.itemsize == 1 else np.dtype(np.int32)  # runtimes add no int16
    parts: list[ir.Value] = []
    for width, above in planes(bits):
        axes = WIDTHS.index(width)
        packed = packed_plane(offset, width, above).reshape(-1, *(2,) * (3 - axes))
        least = 0 if parts else low
        table = plane_table(width, above, least, kind).reshape(256, *(2,) * axes)
        rows = _constant(graph, f"unpack.bits{width}.above{above}.from{least}.{kind}", table)
        index = node("Cast", _constant(graph, f"{name}.bits{width}", packed), to=int(ir.DataType.INT32))
        parts.append(node("Gather", rows, index))
    result = parts[0]
    for plane in parts[1:]:
        result = node("Add", result, plane)
    if offset.size != codes.size:
        start, end = (_constant(graph, f"unpack.{at}", np.array([at])) for at in (0, codes.size))
        result = node("Slice", node("Reshape", result, _constant(graph, "unpack.flat", np.array([-1]))), start, end)
    shape = "x".join(map(str, codes.shape))
    if kind != codes.dtype:
        result = node("Cast", result, to=int(ir.DataType.from_numpy(codes.dtype)))
    result = node("Reshape", result, _constant(graph, f"unpack.shape.{shape}", np.array(codes.shape)))
    result.name, result.shape, result.dtype = name, ir.Shape(codes.shape), ir.DataType.from_numpy(codes.dtype)
    return nodes, result


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """The initializer of this name, made where there is none: what several weights read is in the file once."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=shape, type=kind))
    return graph.initializers[name]
