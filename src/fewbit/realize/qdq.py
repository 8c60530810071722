"""The plan as a standard Q/DQ graph: PT2E's quantized_decomposed ops in the fx graph, ONNX by torch.onnx.

The same graph serves onnxruntime, openvino and every other runtime that reads QuantizeLinear and DequantizeLinear.
Weights are int8 initializers; below 8 bits they are packed, with nodes that unpack them (unpack.py). Each activation's
QuantizeLinear writes a value called `<site>.codes`, a node that chooses by comparing numbers (top-k, the place of the largest,
a threshold) what it has chosen as `<node>.chosen` (chosen.py).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers the quantized_decomposed ops
from torch.fx import GraphModule, Node

from fewbit.capture.normalize import CONVS
from fewbit.capture.selections import selectors, thresholds
from fewbit.capture.sites import readers
from fewbit.core.fx import MOVES, add_constant, argument, aten, calls, constant, give_bias, is_call, is_constant, reached
from fewbit.core.graph import Graph, flat_name
from fewbit.core.grid import QParams, codes, row_step, values
from fewbit.core.plan import Bias, Choice, Plan
from fewbit.realize.beside import save
from fewbit.realize.chosen import mark, name_chosen
from fewbit.realize.fixed import keep_products
from fewbit.realize.fuse import fuse as fuse_nodes
from fewbit.realize.fuse.nodes import NOTHING
from fewbit.realize.older import IR, OLDEST, in_opset
from fewbit.realize.quantizers import check_quantizers
from fewbit.realize.shield import shield
from fewbit.realize.tail import with_tail
from fewbit.realize.torch_onnx import to_onnx
from fewbit.realize.unpack import pack_weights

qd = torch.ops.quantized_decomposed
READS = (qd.dequantize_per_tensor.default, qd.dequantize_per_channel.default)
CODES = ".codes"


def realize(graph: Graph, plan: Plan, path: Path, **form: Any) -> None:
    """Write the plan as an ONNX file, whole or not at all: `realize(graph, plan, path, **target.file_format)`."""
    save(rendered(graph, plan, **form), path)


def rendered(
    graph: Graph, plan: Plan, *, opset: int, ir_version: int = IR, float_weights: bool = False, fuse: Sequence[str] = ()
) -> ir.Model:
    """The plan as an ONNX model with the graph's inputs and outputs, under their names.

    With `float_weights` the weights are float initializers with QuantizeLinear and DequantizeLinear behind them, for runtimes
    that want both (TensorRT); else their codes, with the latter alone. `fuse` names forms of one runtime (fuse/) that take
    the place of standard nodes.
    """
    module, order = qdq_module(graph, plan, float_weights=float_weights)
    choosers = [*selectors(graph.module.graph), *thresholds(graph.module.graph)]
    mark(module, {node.name for node in choosers})
    model = to_onnx(module, graph, max(opset, OLDEST))
    weights = {flat_name(name) for name, choice in plan.choices.items() if choice.codes is not None}
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear" and not _reads(node, weights)]
    check_quantizers(quantizers, [plan.choices[site] for site in order])
    for node, site in zip(quantizers, order, strict=True):
        if plan.choices[site].grid.axis is not None:
            _without_clip(model, node)
        clips = [user for user in node.outputs[0].consumers() if user.op_type == "Clip"]
        (clips[0] if clips else node).outputs[0].name = site + CODES
        node.name = f"{site}.QuantizeLinear"
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear" and _reads(node, weights)]:
        _without_clip(model, node)
    name_chosen(model, choosers)
    if not float_weights:
        pack_weights(model, plan)
    fuse_nodes(model, fuse)
    if graph.batch is not None:
        keep_products(model.graph)
    shield(model)
    return with_tail(in_opset(model, opset, ir_version), graph.tail)


def float_onnx(graph: Graph, path: Path, *, opset: int) -> None:
    """Write the float graph as ONNX: the twin that every comparison is paired with."""
    save(rendered_float(graph, opset=opset), path)


def rendered_float(graph: Graph, *, opset: int, ir_version: int = IR) -> ir.Model:
    """The float graph as an ONNX model."""
    model = to_onnx(graph.module, graph, max(opset, OLDEST))
    return with_tail(in_opset(model, opset, ir_version), graph.tail)


def qdq_module(graph: Graph, plan: Plan, *, float_weights: bool = False) -> tuple[GraphModule, list[str]]:
    """The graph with Q/DQ pairs, and the activation sites in the order in which their codes are computed."""
    module = GraphModule(graph.module, copy.deepcopy(graph.module.graph))
    nodes = {node.name: node for node in module.graph.nodes}
    in_place = {name for name, bias in plan.biases.items() if bias.integer is not None and "bias" in graph.op(name).operands}
    for name in plan.biases:
        if name not in in_place:
            _set_bias(module, nodes[graph.op(name).node], name, plan.biases[name])
    quantizer, clamped = dict[Node, str](), dict[Node, Node]()
    for site in graph.sites:
        for name, operand in site.readers:
            if operand == "bias" and name in in_place:  # behind the weight's nodes
                _set_bias(module, nodes[graph.op(name).node], name, plan.biases[name])
        choice = plan.choices.get(site.name)
        if choice is None:
            continue
        if choice.codes is not None:
            for name, _ in site.readers:
                reader = graph.op(name)
                if reader.kind == "linear":
                    _as_product(module, nodes, reader.node, choice, real=float_weights)
                else:
                    nodes[reader.node].update_arg(1, _dequantize(module, nodes[reader.node], choice, real=float_weights))
            continue
        tensor = nodes[site.tensor]
        users = readers(graph, choice, plan.integer_ops, tensor)
        source = _without_clamp(tensor, choice, users)
        write = _per_tensor if choice.grid.axis is None else _per_channel
        quantized, real = write(module, tensor, source, choice)
        quantizer[quantized] = site.name
        if source is not tensor:
            clamped[quantized] = tensor
        for user in users:
            user.replace_input_with(tensor, real)
    for quantized, tensor in clamped.items():
        if any(other is not quantized and other.args == quantized.args for other in quantizer):
            quantized.update_arg(0, tensor)  # with its clamp: of two quantizers that are alike torch.onnx writes one
    module.graph.eliminate_dead_code()  # a clamp that saturation has replaced reads nothing
    if plan.choices:
        _add_float_biases(module)
    module.graph.lint()
    module.recompile()
    return module.eval(), [quantizer[node] for node in module.graph.nodes if node in quantizer]


def _set_bias(module: GraphModule, node: Node, name: str, bias: Bias) -> None:
    """Set a node's bias to the plan's: codes with a DequantizeLinear, or a float constant."""
    if bias.integer is None:
        give_bias(node, add_constant(module, f"{name}_corrected", bias.real, node))
    else:
        give_bias(node, _dequantize(module, node, bias.integer))


def _per_tensor(module: GraphModule, tensor: Node, source: Node, choice: Choice) -> tuple[Node, Node]:
    """The quantizer of an activation with one scale, behind `tensor`, and the real numbers of its codes."""
    grid, last = choice.grid, tensor
    limits = torch.iinfo(grid.container)
    fills, wide = (grid.low, grid.high) == (limits.min, limits.max), limits.bits > 8
    if not fills and wide:  # runtimes clip no 16-bit codes: saturate the real numbers that have them
        with module.graph.inserting_after(tensor):
            ends = values(torch.tensor([grid.low, grid.high]), choice.qparams, grid).tolist()
            source = last = module.graph.call_function(aten.clamp.default, (source, *ends))
    with module.graph.inserting_after(last):
        quantized = module.graph.call_function(qd.quantize_per_tensor.default, (source, *_arguments(choice)))
    saturated = quantized
    if not fills and not wide:  # the container is wider than the grid: saturate the codes
        with module.graph.inserting_after(quantized):
            saturated = module.graph.call_function(aten.clamp.default, (quantized, grid.low, grid.high))
    with module.graph.inserting_after(saturated):
        return quantized, module.graph.call_function(qd.dequantize_per_tensor.default, (saturated, *_arguments(choice)))


def _per_channel(module: GraphModule, tensor: Node, source: Node, choice: Choice) -> tuple[Node, Node]:
    """The same with a scale for each channel; the real numbers are clamped to the range of each channel's codes."""
    grid, qparams, place = choice.grid, choice.qparams, tensor.next
    limits, dims = torch.iinfo(grid.container), len(tensor.meta["tensor_meta"].shape)
    shape = [-1 if i == grid.axis else 1 for i in range(dims)]
    bounds = {name: (end - qparams.zero) * qparams.scale for name, end in zip(("low", "high"), grid.ends(), strict=True)}
    ends = [add_constant(module, f"{choice.site}_{name}", end.view(shape), place) for name, end in bounds.items()]
    scale = add_constant(module, f"{choice.site}_scale", qparams.scale, place)
    zero = add_constant(module, f"{choice.site}_zero", qparams.zero.to(torch.int64), place)
    arguments = (scale, zero, grid.axis, limits.min, limits.max, grid.container)
    with module.graph.inserting_before(place):
        clamped = module.graph.call_function(aten.clamp.Tensor, (source, *ends))
        quantized = module.graph.call_function(qd.quantize_per_channel.default, (clamped, *arguments))
        return quantized, module.graph.call_function(qd.dequantize_per_channel.default, (quantized, *arguments))


def _as_product(module: GraphModule, nodes: dict[str, Node], name: str, choice: Choice, *, real: bool = False) -> None:
    """linear(x, w, b) as x @ w' + b with w' stored transposed: the form that every runtime has an integer kernel for."""
    linear = nodes[name]
    x, bias = linear.args[0], linear.args[2] if len(linear.args) > 2 else None
    assert choice.codes is not None
    axis = None if choice.grid.axis is None else 1
    turned = replace(choice, codes=choice.codes.t().contiguous(), grid=replace(choice.grid, axis=axis, group_size=0))
    if choice.grid.multiples:  # unpack.py multiplies the codes: what is left is one scale for each channel
        step = row_step(choice.qparams.scale, choice.grid)
        turned = replace(turned, qparams=QParams(step, torch.zeros_like(step, dtype=torch.int32)))
    own = choice.grid.stored == 4 or (choice.grid.group_size and not choice.grid.multiples)
    weight = _native(module, linear, turned) if own else _dequantize(module, linear, turned, real=real)
    call = module.graph.call_function
    flat = len(linear.meta["tensor_meta"].shape) == 2
    with module.graph.inserting_before(linear):
        if flat:  # onnxruntime makes a float Gemm of a flat product and an addition before it looks for Q/DQ
            x = call(aten.unsqueeze.default, (x, 1))
        result = call(aten.matmul.default, (x, weight))
        if bias is not None:
            result = call(aten.add.Tensor, (result, bias))
        if flat:
            result = call(aten.squeeze.dim, (result, 1))
    linear.replace_all_uses_with(result)
    module.graph.erase_node(linear)
    nodes[name] = result


def _native(module: GraphModule, before: Node, choice: Choice) -> Node:
    """A weight (inputs, outputs) with a scale for each block, or stored as 4-bit codes, and the DequantizeLinear behind it."""
    assert choice.codes is not None
    flat, scale = flat_name(choice.site), choice.qparams.scale
    module.register_buffer(flat, choice.codes.to(choice.grid.container))
    module.register_buffer(f"{flat}_scale", scale.t().contiguous())
    block = len(choice.codes) // scale.shape[1] if scale.ndim == 2 else 0
    with module.graph.inserting_before(before):
        codes_node, scale_node = module.graph.get_attr(flat), module.graph.get_attr(f"{flat}_scale")
        return module.graph.call_function(torch.ops.fewbit.dequantize.default, (codes_node, scale_node, block))


def _add_float_biases(module: GraphModule) -> None:
    """Float biases of convolutions as additions behind them; without a bias an addition of nothing where several nodes read,
    be it parts of the result.

    openvino 2026.4 adds the first entry of the bias to all channels where a QuantizeLinear follows, the batch is dynamic and
    the model reads its size (for a class token). An addition it makes part of the kernel again, as onnxruntime does.
    Without one it makes the scale of the product part of a QuantizeLinear that follows. Where another node reads the product
    too it is part of the convolution's kernel as well, so that the codes are those of numbers scaled twice; where nodes read
    parts of the channels (queries, keys and values) it is that of other channels.
    """
    for conv in calls(module.graph, *CONVS):
        bias = argument(conv, 2, "bias")
        shape = conv.meta["tensor_meta"].shape
        if bias is None and is_call(conv.args[1], *READS) and _computed_from(conv) > 1:
            name, numbers = f"{conv.name}_nothing", torch.full((shape[1],), float(NOTHING))
        elif is_constant(bias):
            give_bias(conv, None)
            name, numbers = f"{bias.name}_map", constant(module, bias)
        else:
            continue
        flat = add_constant(module, name, numbers.view([1, -1] + [1] * (len(shape) - 2)), conv)
        behind = list(conv.users)
        with module.graph.inserting_after(conv):
            total = module.graph.call_function(aten.add.Tensor, (conv, flat))
        for user in behind:
            user.replace_input_with(conv, total)


def _computed_from(node: Node) -> int:
    """The number of nodes that compute from a node's numbers or from parts of them, wherever they are put."""
    return sum(not is_call(reader, *MOVES) for reader in reached(node, lambda reader: is_call(reader, *MOVES)))


def _arguments(choice: Choice) -> tuple[float, int, int, int, torch.dtype]:
    limits = torch.iinfo(choice.grid.container)
    return float(choice.qparams.scale), int(choice.qparams.zero), limits.min, limits.max, choice.grid.container


def _dequantize(module: GraphModule, before: Node, choice: Choice, *, real: bool = False) -> Node:
    """A constant of codes and the DequantizeLinear behind it, just before a node; with `real` the constant holds real numbers
    that are those of codes, and a QuantizeLinear stands between.
    """
    assert choice.codes is not None
    flat, axis, call = flat_name(choice.site), choice.grid.axis, module.graph.call_function
    data = choice.real if real else choice.codes.to(choice.grid.container)
    module.register_buffer(flat, data)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(flat)
        if axis is None:
            arguments: tuple[Any, ...] = _arguments(choice)
            write, read = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
        else:
            module.register_buffer(f"{flat}_scale", choice.qparams.scale)
            module.register_buffer(f"{flat}_zero", choice.qparams.zero.to(torch.int64))
            scale, zero = module.graph.get_attr(f"{flat}_scale"), module.graph.get_attr(f"{flat}_zero")
            limits = torch.iinfo(choice.grid.container)
            arguments = (scale, zero, axis, limits.min, limits.max, choice.grid.container)
            write, read = qd.quantize_per_channel.default, qd.dequantize_per_channel.default
        if real:
            node = call(write, (node, *arguments))
        return call(read, (node, *arguments))


def _without_clip(model: ir.Model, quantizer: ir.Node) -> None:
    """Without the Clip to the limits of the container that torch.onnx writes behind a QuantizeLinear with many scales."""
    for clip in [user for user in quantizer.outputs[0].consumers() if user.op_type == "Clip"]:
        ir.convenience.replace_all_uses_with(clip.outputs[0], quantizer.outputs[0])
        model.graph.remove(clip, safe=True)


def _reads(node: ir.Node, constants: Collection[str]) -> bool:
    """Whether a node reads one of the constants; what torch.onnx has computed from constants is none of them."""
    source = node.inputs[0]
    return source is not None and source.is_initializer() and source.name in constants


def _without_clamp(tensor: Node, choice: Choice, users: list[Node]) -> Node:
    """The tensor before relus or clamps whose limits are those of the grid: saturation does the same for nothing."""
    bounds, grid, alone = clamp_bounds(tensor), choice.grid, len(users) == len(tensor.users)
    while bounds is not None and alone and grid.axis is None:
        ends = codes(torch.tensor(bounds, dtype=torch.float64).clamp(-1e30, 1e30).float(), choice.qparams, grid)
        if ends.tolist() != [grid.low, grid.high]:
            break
        tensor = cast(Node, tensor.args[0])
        bounds, alone = clamp_bounds(tensor), len(tensor.users) == 1
    return tensor


def clamp_bounds(node: Node) -> tuple[float, float] | None:
    """Lower and upper limit of a relu, relu6, hardtanh or clamp; None for anything else."""
    infinity = float("inf")
    if is_call(node, aten.relu.default, aten.relu_.default):
        return 0.0, infinity
    if is_call(node, aten.relu6.default):
        return 0.0, 6.0
    if is_call(node, aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default):
        arguments: list[Any] = list(node.args[1:3]) + [None] * (3 - len(node.args))
        defaults = (-infinity, infinity) if is_call(node, aten.clamp.default) else (-1.0, 1.0)
        low, high = (d if g is None else g for g, d in zip(arguments, defaults, strict=True))
        return (float(low), float(high)) if not isinstance(low, Node) and not isinstance(high, Node) else None
    return None
