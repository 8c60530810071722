"""What can be quantized, by graph structure: ops of the kinds in `kinds.py`, and the tensors that they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor
from torch.fx import GraphModule, Node

from fewbit.capture.canonicalize import MATMUL
from fewbit.capture.costs import count_costs
from fewbit.capture.kinds import KINDS, MAX_POOLS, PADS, OpKind, kind_of, shape_for_one
from fewbit.capture.normalize import CONVS, normalize
from fewbit.core.fx import MOVES, aten, back_through, constant, is_call, is_constant, reached
from fewbit.core.graph import FloatProduct, Graph, Op, Site
from fewbit.core.inputs import Input
from fewbit.core.plan import Choice
from fewbit.errors import BadModel
from fewbit.load.loaded import Loaded
from fewbit.load.ports import without_wrapper
from fewbit.load.program import graph_module

# what reads a tensor for its sizes alone: where these are known beforehand it is a constant, which torch.onnx computes
SIZES = (
    aten.sym_size.int,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
WEIGHTED = tuple(name for name, kind in KINDS.items() if kind.weighted)  # kinds of op that read a weight


def capture(loaded: Loaded) -> Graph:
    """The graph of a model: opened, folded, its ops and sites named. Raises BadModel where there is nothing to quantize."""
    module = normalize(graph_module(loaded.program))
    count_costs(module, loaded.inputs, loaded.batch or 1)
    known = SIZES if loaded.batch is not None and not any(one.free for one in loaded.inputs) else ()
    depend = {
        node: {node, *reached(node, lambda reader: not is_call(reader, *known))}
        for node in module.graph.find_nodes(op="placeholder")
    }
    computed = set[Node]().union(*depend.values())
    ops, sites = find(module, computed, _without_batch(depend, loaded.inputs))
    if not ops:
        raise BadModel(
            f"{loaded.ref} has no linear, convolution or matrix product; there is nothing to quantize; give another model."
        )
    taken = {op.node for op in ops}
    others = _float_products(module, (node for node in module.graph.nodes if node in computed and node.name not in taken))
    many = loaded.batch or 1
    behind = (replace(one, macs=one.macs // many) for one in (loaded.tail.products if loaded.tail else ()))
    return Graph(
        module, tuple(ops), tuple(sites), loaded.inputs, loaded.outputs, (*others, *behind), loaded.batch, loaded.ports,
        tail=loaded.tail,
    )  # fmt: skip


def _without_batch(behind: Mapping[Node, set[Node]], inputs: Sequence[Input]) -> set[Node]:
    """The nodes that depend on inputs without a batch and on no others, from those `behind` each input; what reads them is left
    float.
    """
    alone, others = (
        set[Node]().union(*(nodes for nodes, one in zip(behind.values(), inputs, strict=True) if one.has_batch is batch))
        for batch in (False, True)
    )
    return alone - others


def find(module: GraphModule, computed: Collection[Node], floats: Collection[Node] = ()) -> tuple[list[Op], list[Site]]:
    """Ops in graph order and the sites that they read; a tensor that two ops read is one site. Those that read one of `floats`,
    or integers, are no ops, nor is what stands outside of `computed`: it depends on no input (the attention of learned queries
    to each other), so it is the same number for every image and is computed once.
    """
    names = _op_names(module, computed, floats)
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
        ops.append(Op(name, node.name, kind.name, operands, node.meta["macs"], _terms(module, node, kind)))
    sites = []
    for key, (site, role, tensor) in first.items():
        shape = tuple(constant(module, tensor).shape) if is_constant(tensor) else shape_for_one(tensor)
        sites.append(Site(site, role, tensor.name, shape, tuple(readers[key]), axis=0 if role in ("weight", "bias") else None))
    return ops, sites


def _float_products(module: GraphModule, others: Iterable[Node]) -> tuple[FloatProduct, ...]:
    """Those of the nodes that are no ops that have products."""
    nodes = [node for node in others if node.meta.get("macs")]
    return tuple(FloatProduct(path_of(node) or node.name, _function(module, node), node.meta["macs"]) for node in nodes)


def _function(module: GraphModule, node: Node) -> str:
    """What a node that is no op computes: its function, and where others of it are ops, in what it differs from them."""
    (name,) = str(node.target).split(".")[1:2] or [node.name]  # aten.conv_transpose2d.input
    if (kind := kind_of(module, node)) is not None:
        whole = any(not _is_real(read) for read in kind.reads(node).values())
        return f"{kind.name} of {'whole numbers' if whole else 'numbers that are the same for every image'}"
    if is_call(node, MATMUL):
        constants = [constant(module, one) for one in node.all_input_nodes if is_constant(one)]
        many = any(one.ndim > 2 for one in constants)
        return f"{name} with {'a constant matrix for each head or expert' if many else 'a constant vector'}"
    return f"{name} with weights that are computed" if is_call(node, *CONVS) else name


def path_of(node: Node) -> str:
    """The module path of a node, from torch.export's metadata, without the wrapper of NamedPorts."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    return "" if path.startswith("_empty") else without_wrapper(path)


def _op_names(module: GraphModule, computed: Collection[Node], floats: Collection[Node]) -> Mapping[Node, tuple[str, OpKind]]:
    """A unique name and a kind for every node that can run in integers."""
    candidates: list[tuple[Node, str, OpKind]] = []
    for node in module.graph.nodes:
        kind = kind_of(module, node)
        if (
            kind is None
            or node not in computed
            or any(read in floats or not _is_real(read) for read in kind.reads(node).values())
        ):
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


def _is_real(node: Node) -> bool:
    dtype = getattr(node.meta.get("tensor_meta"), "dtype", None)
    return dtype is None or bool(dtype.is_floating_point)


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


def about_zeros(graph: Graph, names: Container[str]) -> tuple[str, ...]:
    """A sentence about those weights among the sites of these names that hold zeros alone; nothing where there is none."""
    weights = [site for site in graph.sites if site.role == "weight" and site.name in names]
    zeros = [site.name for site in weights if not bool(tensor_of(graph, site).any())]
    if not zeros:
        return ()
    listed = ", ".join(zeros[:3]) + (f" and {len(zeros) - 3} more" if len(zeros) > 3 else "")
    return (f"All numbers of {listed} are 0, so what goes through there says nothing of an image. Are these trained weights?",)


def owner_of(node: Node, owners: Mapping[str, str]) -> str | None:
    """The first of `owners` (node name -> site) behind views and poolings of maxima: the tensor holds codes of that site."""
    return next((owners[n.name] for n in back_through(node, {*MOVES, *MAX_POOLS}) if n.name in owners), None)


def _terms(module: GraphModule, node: Node, kind: OpKind) -> int | None:
    """The products in one output; None for an op without."""
    if not kind.product:
        return None
    left, right = (cast(Node, read) for read in node.args[:2])
    return constant(module, right)[0].numel() if kind.weighted else shape_for_one(left)[-1]
