"""The residual stream, found once: what writes into it, which norms read it, the addition behind a layer; blocks, which are
modules with the addition behind them or forks with the one that joins them; and pairs of convolutions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from fewbit.capture.canonicalize import LINEAR
from fewbit.capture.kinds import ADDS, clamped, shape_for_one
from fewbit.capture.structure import Norm, modules, norms, own_weight
from fewbit.core.fx import MOVES, argument, aten, between, constant, is_call, is_constant
from fewbit.core.graph import Graph, Op

ALONG = (aten.select.int, aten.slice.Tensor, aten.expand.default, aten.clone.default, aten.contiguous.default)
CONVS = (aten.conv2d.default,)
CONVOLUTIONS = ("conv", "depthwise")


@dataclass(frozen=True)
class Residual:
    """The residual stream: the layers and constants that write into it, and the norms that alone read it."""

    width: int
    writers: tuple[Op, ...]
    constants: tuple[Node, ...]
    norms: tuple[Norm, ...]


def residual(graph: Graph) -> Residual | None:
    """The residual stream of a transformer; None where anything but layer norms reads it, or anything but layers writes it."""
    by_node = {op.node: op for op in graph.ops}
    known = {norm.node: norm for norm in norms(graph)}
    if not known:
        return None
    width = width_of(next(iter(known)))
    writers: dict[str, Op] = {}
    constants: dict[Node, None] = {}
    read: dict[Node, Norm] = {}
    pending, visited = [cast(Node, norm.args[0]) for norm in known], set[Node]()
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        if width_of(node) != width:
            return None
        if is_constant(node):
            if len(node.users) != 1:
                return None
            constants[node] = None
            continue
        before = _sources(node)
        if before is None:
            op = _writer(graph, node, by_node)
            if op is None:
                return None
            writers[op.name] = op
        else:
            pending += before
        for user in node.users:
            if user in known:
                read[user] = known[user]
            elif _sources(user) is None:
                return None
            else:
                pending.append(user)
    ordered = tuple(op for op in graph.ops if op.name in writers)
    return Residual(width, ordered, tuple(constants), tuple(norm for node, norm in known.items() if node in read))


def _sources(node: Node) -> list[Node] | None:
    """What a node of the stream is put together from; None for one that is not an addition, row or list of rows of it."""
    if is_call(node, *ADDS) and not node.kwargs.get("alpha") and all(isinstance(a, Node) for a in node.args[:2]):
        return [cast(Node, a) for a in node.args[:2]]
    if is_call(node, aten.cat.default):
        axis = cast(int, argument(node, 1, "dim", 0))
        return list(cast("list[Node]", node.args[0])) if axis not in (-1, len(shape_for_one(node)) - 1) else None
    if is_call(node, *ALONG):
        return [cast(Node, node.args[0])]
    return None


def _writer(graph: Graph, node: Node, by_node: dict[str, Op]) -> Op | None:
    """The layer that alone makes a tensor of the stream, through views at most, and is read by nothing else."""
    stream = node
    while is_call(node, *MOVES) and (node is stream or len(node.users) == 1):
        node = cast(Node, node.args[0])
    op = by_node.get(node.name)
    plain = is_call(node, LINEAR) or (is_call(node, *CONVS) and argument(node, 6, "groups", 1) == 1)
    return op if op is not None and plain and (node is stream or len(node.users) == 1) and own_weight(graph, op) else None


def width_of(node: Node) -> int:
    """The last size of a value."""
    value: Any = constant(node.graph.owning_module, node) if is_constant(node) else node.meta["tensor_meta"]  # type: ignore[arg-type]
    return int(value.shape[-1])


def joined(linear: Node) -> Node | None:
    """The other side of the addition that alone reads a layer's output: the residual stream before it."""
    users = list(linear.users)
    if len(users) != 1 or not is_call(users[0], *ADDS) or users[0].kwargs.get("alpha"):
        return None
    sides = [side for side in users[0].args[:2] if side is not linear]
    if len(sides) != 1 or not isinstance(sides[0], Node) or is_constant(sides[0]):
        return None
    return sides[0] if shape_for_one(linear) == shape_for_one(sides[0]) else None


@dataclass(frozen=True)
class Block:
    """Ops with a weight that are learnt together. `nodes` compute `output`, the last of them, from the values of `reads` and
    from `counts`, which are numbers in proportion to the images of a batch.
    """

    name: str
    ops: tuple[str, ...]
    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    counts: tuple[Node, ...]
    macs: int

    @property
    def output(self) -> Node:
        return self.nodes[-1]


def blocks(graph: Graph, integer_ops: Collection[str], scope: str) -> list[Block]:
    """The blocks in graph order; every integer op with a weight is in exactly one.

    `scope` = `op`: each op by itself, with the clamp behind it. `block`: attention modules and MLPs with the residual addition
    behind them; of the other ops those between a fork and the addition that joins it; what is left, each by itself.
    """
    nodes = {node.name: node for node in graph.module.graph.nodes}
    order = {node: i for i, node in enumerate(nodes.values())}
    weighted = {op.name: op for op in graph.ops if op.name in integer_ops and "weight" in op.operands}
    owner = {op.node: op.name for op in graph.ops if op.name in weighted}
    groups: list[tuple[str, list[str], Node]] = []
    if scope == "block":
        for module in modules(graph):
            members = [op for op in module.ops if op in weighted]
            if module.kind != "op" and members:
                groups.append((module.name, members, _with_addition(nodes[module.output], members, nodes, graph, order)))
        taken = {op for _, members, _ in groups for op in members}
        for node in nodes.values():
            if is_call(node, *ADDS):
                inside = [owner[n.name] for n in _fork(node, order) if n.name in owner]
                if len(inside) > 1 and not taken & set(inside):
                    groups.append((f"{inside[0]} to {inside[-1]}", inside, node))
                    taken |= set(inside)
    else:
        taken = set()
    groups += [(name, [name], nodes[op.node]) for name, op in weighted.items() if name not in taken]
    result: list[Block] = []
    for name, members, output in groups:
        block = _block(graph, name, members, clamped(output), nodes)
        starts = [order[nodes[graph.op(op).node]] for op in members]
        if len(members) > 1 and max(order[read] for read in block.reads) > min(starts):  # the images would be past its ops
            result += [_block(graph, op, [op], clamped(nodes[graph.op(op).node]), nodes) for op in members]
        else:
            result.append(block)
    products = {op.node for op in graph.ops if op.reduction_size is not None}
    result = [_narrowed(block, order, products) for block in result]
    return sorted(result, key=lambda block: min(order[nodes[graph.op(op).node]] for op in block.ops))


def _block(graph: Graph, name: str, members: Iterable[str], output: Node, nodes: dict[str, Node]) -> Block:
    ops: list[Op] = [graph.op(op) for op in members]
    inner, reads = between([output], [nodes[op.node] for op in ops])
    counts = tuple(read for read in reads if is_count(read))
    tensors = tuple(read for read in reads if not is_count(read))
    return Block(name, tuple(op.name for op in ops), tuple(inner), tensors, counts, sum(op.macs for op in ops))


def is_count(node: Node) -> bool:
    """A size: only the batch has one that is not a constant of the graph."""
    return "tensor_meta" not in node.meta and not is_constant(node)


def _with_addition(output: Node, members: list[str], nodes: dict[str, Node], graph: Graph, order: dict[Node, int]) -> Node:
    """The residual addition behind a unit, where its other side is there before the unit; else the output."""
    other = joined(output)
    first = min(order[nodes[graph.op(op).node]] for op in members)
    return next(iter(output.users)) if other is not None and order[other] < first else output


def _fork(addition: Node, order: dict[Node, int]) -> list[Node]:
    """The nodes between an addition and the node that all of it comes from, in order; none where it adds no two branches."""
    sides = [side for side in addition.args[:2] if isinstance(side, Node) and not is_constant(side)]
    if len(sides) < 2:
        return []
    return sorted(_behind(set(sides), order)[0], key=order.__getitem__)


def _behind(reads: set[Node], order: dict[Node, int], stop: Collection[Any] = ()) -> tuple[set[Node], set[Node]]:
    """Nodes behind `reads`, the latest first, until one value is left that all comes from: (passed, left). A node whose name is
    in `stop`, or that reads nothing, is not passed.
    """
    passed: set[Node] = set()
    left = set(reads)
    while len(left) > 1:
        last = max(left, key=order.__getitem__)
        before = {read for read in last.all_input_nodes if not is_constant(read) and not is_count(read)}
        if not before or last.name in stop:
            break
        left = (left - {last}) | before
        passed.add(last)
    return passed, left


def _narrowed(block: Block, order: dict[Node, int], products: Collection[str]) -> Block:
    """The block with what lies between one value and all that it reads (a layer norm), where no other product is there."""
    passed, left = _behind(set(block.reads), order, products)
    if len(left) > 1 or not passed:
        return block
    nodes = sorted(passed | set(block.nodes), key=order.__getitem__)
    counts = {read for node in nodes for read in node.all_input_nodes if is_count(read)}
    return Block(block.name, block.ops, tuple(nodes), tuple(left), tuple(sorted(counts, key=order.__getitem__)), block.macs)


@dataclass(frozen=True)
class ConvPair:
    """Two convolutions, directly or with a ReLU between, and the tensor between them, which nobody else reads."""

    first: Op
    second: Op
    between: Node


def conv_pairs(graph: Graph) -> list[ConvPair]:
    """Convolutions without groups, or depthwise, that follow each other directly or through a ReLU."""
    by_node, pairs = {op.node: op for op in graph.ops}, []
    nodes = {node.name: node for node in graph.module.graph.nodes}
    for op in graph.ops:
        node = nodes[op.node]
        if op.kind not in CONVOLUTIONS or len(node.users) != 1:
            continue
        between, user = node, next(iter(node.users))
        if is_call(user, aten.relu.default) and len(user.users) == 1:
            between, user = user, next(iter(user.users))
        second = by_node.get(user.name)
        if second is None or second.kind not in CONVOLUTIONS or user.args[0] is not between:
            continue
        w = constant(graph.module, cast(Node, user.args[1]))
        plain = second.kind == "depthwise" or w.shape[1] == between.meta["tensor_meta"].shape[1]
        if plain and own_weight(graph, op) and own_weight(graph, second):
            pairs.append(ConvPair(op, second, between))
    return pairs
