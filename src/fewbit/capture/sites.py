"""What can be quantized, found from structure: ops that products or joins, and the tensors that they read.

Roles come from what a tensor is, not from what a library calls it: the left operand of a product that is a softmax is
`probs`, the two operands of the product that feeds a softmax are `query` and `key`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

from fewbit.capture.canonicalize import DROPOUTS, LINEAR, MATMUL, SOFTMAX
from fewbit.capture.export import WRAPPER, Loaded, graph_module
from fewbit.capture.fx import MOVES, SCALINGS, argument, aten, back_through, constant, is_call, is_constant
from fewbit.capture.normalize import CONVS, SDPA, normalize
from fewbit.core.values import Choice, Graph, Op, Site
from fewbit.errors import BadModel

ADDS = (aten.add.Tensor,)
WEIGHTED = ("linear", "conv", "depthwise")  # kinds of op that read a weight
POOLS = (aten.adaptive_avg_pool2d.default,)
MAX_POOLS = (aten.max_pool2d.default,)  # of codes that grow with the value: the largest is one of them
CONCATS = (aten.cat.default,)
# what a runtime folds into the product before it, so that the product's output is the tensor behind it
PADS = (aten.pad.default, aten.constant_pad_nd.default)
CLAMPS = (
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
)
# what stands between a product and the softmax of its logits
LOGIT_PATH: set[Callable[..., Any]] = {
    *ADDS,
    *SCALINGS,
    aten.sub.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    *MOVES,
}
# work that would be a product of integers if it had a form that find() takes
PRODUCTS = (
    LINEAR,
    MATMUL,
    SDPA,
    *CONVS,
    aten.einsum.default,
    aten.bilinear.default,
    aten.convolution.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)


def capture(loaded: Loaded) -> Graph:
    """The graph of a model: opened, folded, its ops and sites named. Raises BadModel where there is nothing to quantize."""
    module = normalize(graph_module(loaded.program))
    ShapeProp(module).propagate(torch.zeros(1, *loaded.input_shape))
    ops, sites = find(module)
    if not ops:
        raise BadModel(f"{loaded.ref} has no linear, convolution or matrix product; there is nothing to quantize.")
    return Graph(module, tuple(ops), tuple(sites), loaded.input_shape, _notes(module, {op.node for op in ops}))


def find(module: GraphModule) -> tuple[list[Op], list[Site]]:
    """Ops in graph order and the sites that they read; a tensor that two ops read is one site."""
    names = _op_names(module)
    ops: list[Op] = []
    readers: dict[str, list[tuple[str, str]]] = {}
    first: dict[str, tuple[str, str, Node]] = {}
    for node, (name, kind) in names.items():
        operands = {}
        for operand, tensor in _operands(module, node, kind).items():
            site = f"{name}:{operand}"
            key = site if operand in ("weight", "bias") else tensor.name
            first.setdefault(key, (site, operand, tensor))
            readers.setdefault(key, []).append((name, operand))
            operands[operand] = first[key][0]
        macs, terms = _cost(module, node, kind)
        ops.append(Op(name, node.name, kind, operands, macs, terms))
    sites = []
    for key, (site, role, tensor) in first.items():
        shape = tuple(constant(module, tensor).shape) if is_constant(tensor) else _shape(tensor)
        sites.append(Site(site, role, tensor.name, shape, tuple(readers[key]), axis=0 if role in ("weight", "bias") else None))
    return ops, sites


def _notes(module: GraphModule, found: set[str]) -> tuple[str, ...]:
    """One line for every product that is no op, and for dropout that the model leaves on."""
    notes = []
    for node in module.graph.nodes:
        where = f"{path_of(node) or node.name}: {node.target}"
        if is_call(node, *PRODUCTS) and node.name not in found:
            notes.append(f"{where} stays float, it was not opened")
        elif is_call(node, *DROPOUTS):
            notes.append(f"{where} is on outside of training; the model's output is random")
    return tuple(notes)


def path_of(node: Node) -> str:
    """The module path of a node, from torch.export's metadata, without the wrapper of FirstTensor."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    return "" if path.startswith("_empty") else path.removeprefix(WRAPPER).removeprefix(".")


def block_of(name: str) -> str:
    """The part of an op's or site's name up to its last number, the repeated unit that it belongs to; or its first word.

    A number is a part of its own or ends one (`encoder_layer_3`); the last part of a name is the op itself.
    """
    parts = name.split(":")[0].split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.rpartition("_")[2].isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else parts[0]


def _op_names(module: GraphModule) -> Mapping[Node, tuple[str, str]]:
    """A unique name and a kind for every node that can run in integers."""
    found: list[tuple[Node, str, str]] = []
    for node in module.graph.nodes:
        kind = _kind(module, node)
        if kind is None:
            continue
        suffix = {"scores": "qk", "mix": "pv"}.get(kind, kind)
        path = [part for part in (path_of(node), "" if kind in WEIGHTED else suffix) if part]
        found.append((node, ".".join(path) or node.name, "matmul" if kind in ("scores", "mix") else kind))
    total, seen = Counter(name for _, name, _ in found), Counter[str]()
    names: dict[Node, tuple[str, str]] = {}
    for node, name, kind in found:
        unique = name
        while total[name] > 1 and (unique == name or unique in total):  # a module may be called `name`.1 as well
            seen[name] += 1
            unique = f"{name}.{seen[name]}"
        names[node] = (unique, kind)
    return names


def _kind(module: GraphModule, node: Node) -> str | None:
    if is_call(node, LINEAR) and is_constant(node.args[1]):
        return "linear"
    if is_call(node, *CONVS) and is_constant(node.args[1]):
        weight, groups = constant(module, cast(Node, node.args[1])), argument(node, 6, "groups", 1)
        return "depthwise" if groups > 1 and weight.shape[1] == 1 else "conv"
    if is_call(node, MATMUL) and not any(is_constant(a) for a in node.args):
        if _is_softmax(cast(Node, node.args[0])):
            return "mix"
        return "scores" if _feeds_softmax(node) else "matmul"
    if is_call(node, *ADDS) and _two_activations(node) and not node.kwargs.get("alpha"):
        return "add"
    if is_call(node, *POOLS) and _shape(node)[-2:] == (1, 1):
        return "avgpool"
    if is_call(node, *MAX_POOLS):
        return "maxpool"
    if is_call(node, *CONCATS) and _joins_channels(node):
        return "concat"
    return None


def _operands(module: GraphModule, node: Node, kind: str) -> dict[str, Node]:
    """Operand name -> the node whose value is read (or written, for `output`)."""
    if kind == "concat":
        inputs = enumerate(cast("list[Node]", node.args[0]), 1)
        return {**{f"input{i}": read for i, read in inputs}, "output": _fused_output(node)}
    left, right = (cast(Node, a) for a in (*node.args[:2], None)[:2])
    if kind in WEIGHTED:
        left = before_padding(left)
        bias = argument(node, 2, "bias")
        found = {"input": left, "weight": right}
        if is_constant(bias):
            found["bias"] = bias
        if kind != "linear":
            found["output"] = _fused_output(node)
        return found
    if kind == "matmul":
        if _is_softmax(left):
            return {"probs": left, "value": right}
        if _feeds_softmax(node):
            return {"query": left, "key": right}
        return {"left": left, "right": right}
    if kind == "add":
        return {"left": left, "right": right, "output": _fused_output(node)}
    return {"input": left, "output": node}


def readers(graph: Graph, choice: Choice, integer_ops: Collection[str], tensor: Node) -> list[Node]:
    """The nodes that read the codes of an activation: integer ops (through the padding before them), or all_readers."""
    if choice.all_readers:
        return list(tensor.users)
    ops = [op for op, operand in graph.site(choice.site).readers if op in integer_ops and operand != "output"]
    wanted = {graph.op(op).node for op in ops}
    return [u for u in tensor.users if u.name in wanted or (is_call(u, *PADS) and any(v.name in wanted for v in u.users))]


def tensor_of(graph: Graph, site: Site) -> Tensor:
    """The constant behind a weight or bias site."""
    node = next(n for n in graph.module.graph.nodes if n.name == site.tensor)
    return constant(graph.module, node)


def owner_of(node: Node, owners: Mapping[str, str]) -> str | None:
    """The first of `owners` (node name -> site) behind views and poolings of maxima: the tensor holds codes of that site."""
    return next((owners[n.name] for n in back_through(node, {*MOVES, *MAX_POOLS}) if n.name in owners), None)


def before_padding(node: Node) -> Node:
    """The tensor behind a padding with zeros: its codes are the padded codes, since zero is always a code.

    Runtimes put the padding into the convolution, so Q/DQ stand before it.
    """
    while is_call(node, aten.pad.default, aten.constant_pad_nd.default):
        mode = argument(node, 2, "mode", "constant") if is_call(node, aten.pad.default) else "constant"
        value = argument(node, 3 if is_call(node, aten.pad.default) else 2, "value", 0) or 0
        if mode != "constant" or value != 0:
            break
        node = cast(Node, node.args[0])
    return node


def _fused_output(node: Node) -> Node:
    """The node, or the clamp behind it that alone reads it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], *CLAMPS) else node


def _cost(module: GraphModule, node: Node, kind: str) -> tuple[int, int | None]:
    """Multiply-accumulates for one image, and the products in one output."""
    if kind in WEIGHTED:
        terms = constant(module, cast(Node, node.args[1]))[0].numel()
    elif kind == "matmul":
        terms = _shape(cast(Node, node.args[0]))[-1]
    else:
        return 0, None
    return _numel(node) * terms, terms


def _is_softmax(node: Node) -> bool:
    """A softmax, or views and moves of one."""
    while is_call(node, *MOVES) and isinstance(node.args[0], Node):
        node = node.args[0]
    return is_call(node, *SOFTMAX)


def _feeds_softmax(node: Node) -> bool:
    """The value reaches a softmax through additions, scalings, masks and views only."""
    pending, seen = list(node.users), set[Node]()
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if is_call(user, *SOFTMAX):
            return True
        if is_call(user, *LOGIT_PATH):
            pending.extend(user.users)
    return False


def _two_activations(node: Node) -> bool:
    """Two tensors of the same shape that depend on the image."""
    a, b = node.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node) or is_constant(a) or is_constant(b):
        return False
    return _shape(a) == _shape(b) and len(_shape(a)) >= 2


def _joins_channels(node: Node) -> bool:
    """Maps that depend on the image, one behind the other along their channels."""
    read, axis = cast("list[Node]", node.args[0]), argument(node, 1, "dim", 0)
    return axis in (1, -3) and all(not is_constant(a) and len(_shape(a)) == 4 for a in read)


def _shape(node: Node) -> tuple[int, ...]:
    """The shape for one image, as shape propagation has found it; empty for what is no tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _numel(node: Node) -> int:
    return int(torch.Size(_shape(node)).numel())
