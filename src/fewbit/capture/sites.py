"""What can be quantized, by graph structure: ops of the kinds in `kinds.py`, and the tensors that they read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

from fewbit.capture.canonicalize import DROPOUTS, LINEAR, MATMUL
from fewbit.capture.export import WRAPPER, graph_module
from fewbit.capture.fx import MOVES, aten, back_through, constant, is_call, is_constant
from fewbit.capture.kinds import KINDS, MAX_POOLS, PADS, OpKind, kind_of, shape_for_one
from fewbit.capture.load import Loaded
from fewbit.capture.normalize import CONVS, SDPA, normalize
from fewbit.core.values import Choice, Graph, Op, Site
from fewbit.errors import BadModel

WEIGHTED = tuple(name for name, kind in KINDS.items() if kind.weighted)  # kinds of op that read a weight
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
        for operand, tensor in kind.tensors(node).items():
            site = f"{name}:{operand}"
            key = site if operand in ("weight", "bias") else tensor.name
            first.setdefault(key, (site, operand, tensor))
            readers.setdefault(key, []).append((name, operand))
            operands[operand] = first[key][0]
        macs, terms = _cost(module, node, kind)
        ops.append(Op(name, node.name, kind.name, operands, macs, terms))
    sites = []
    for key, (site, role, tensor) in first.items():
        shape = tuple(constant(module, tensor).shape) if is_constant(tensor) else shape_for_one(tensor)
        sites.append(Site(site, role, tensor.name, shape, tuple(readers[key]), axis=0 if role in ("weight", "bias") else None))
    return ops, sites


def _notes(module: GraphModule, op_nodes: set[str]) -> tuple[str, ...]:
    """One line for every product that is no op, and for dropout that the model leaves on."""
    notes = []
    for node in module.graph.nodes:
        where = f"{path_of(node) or node.name}: {node.target}"
        if is_call(node, *PRODUCTS) and node.name not in op_nodes:
            notes.append(f"{where} stays float, it was not opened")
        elif is_call(node, *DROPOUTS):
            notes.append(f"{where} is on outside of training; the model's output is random")
    return tuple(notes)


def path_of(node: Node) -> str:
    """The module path of a node, from torch.export's metadata, without the wrapper of FirstTensor."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    return "" if path.startswith("_empty") else path.removeprefix(WRAPPER).removeprefix(".")


def _op_names(module: GraphModule) -> Mapping[Node, tuple[str, OpKind]]:
    """A unique name and a kind for every node that can run in integers."""
    candidates: list[tuple[Node, str, OpKind]] = []
    for node in module.graph.nodes:
        kind = kind_of(module, node)
        if kind is None:
            continue
        suffix = {"query": "qk", "probs": "pv"}.get(next(iter(kind.reads(node))), kind.name)
        path = [part for part in (path_of(node), "" if kind.weighted else suffix) if part]
        candidates.append((node, ".".join(path) or node.name, kind))
    total, index = Counter(name for _, name, _ in candidates), Counter[str]()
    names: dict[Node, tuple[str, OpKind]] = {}
    for node, name, kind in candidates:
        unique = name
        while total[name] > 1 and (unique == name or unique in total):  # a module may be called `name`.1 as well
            index[name] += 1
            unique = f"{name}.{index[name]}"
        names[node] = (unique, kind)
    return names


def readers(graph: Graph, choice: Choice, integer_ops: Collection[str], tensor: Node) -> list[Node]:
    """The nodes that read the codes of an activation: integer ops (through the padding before them), or all_readers."""
    if choice.all_readers:
        return list(tensor.users)
    ops = [op for op, operand in graph.site(choice.site).readers if op in integer_ops and operand != "output"]
    op_nodes = {graph.op(op).node for op in ops}
    return [u for u in tensor.users if u.name in op_nodes or (is_call(u, *PADS) and any(v.name in op_nodes for v in u.users))]


def tensor_of(graph: Graph, site: Site) -> Tensor:
    """The constant behind a weight or bias site."""
    node = next(n for n in graph.module.graph.nodes if n.name == site.tensor)
    return constant(graph.module, node)


def owner_of(node: Node, owners: Mapping[str, str]) -> str | None:
    """The first of `owners` (node name -> site) behind views and poolings of maxima: the tensor holds codes of that site."""
    return next((owners[n.name] for n in back_through(node, {*MOVES, *MAX_POOLS}) if n.name in owners), None)


def _cost(module: GraphModule, node: Node, kind: OpKind) -> tuple[int, int | None]:
    """Multiply-accumulates for one image, and the products in one output."""
    if not kind.product:
        return 0, None
    left, right = (cast(Node, read) for read in node.args[:2])
    terms = constant(module, right)[0].numel() if kind.weighted else shape_for_one(left)[-1]
    return math.prod(shape_for_one(node)) * terms, terms
