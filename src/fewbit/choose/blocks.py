"""The parts of a graph whose weights are learnt together, each with the nodes that compute its output and what they read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fewbit.capture.fx import is_call, is_constant
from fewbit.capture.sites import ADDS, CLAMPS
from fewbit.capture.units import units
from fewbit.choose.layers import joined
from fewbit.core.values import Graph, Op
from fewbit.execute.overlay import between


@dataclass(frozen=True)
class Part:
    """Ops with a weight; `nodes` in order compute `output`, the last of them, from the values of `reads` and from `counts`,
    which are numbers in proportion to the images of a batch.
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


def parts(graph: Graph, integer_ops: Collection[str], scope: str) -> list[Part]:
    """The parts in graph order; every integer op with a weight is in exactly one.

    `scope` = `op`: each op by itself, with the clamp behind it. `unit`: attention modules and MLPs with the residual addition
    behind them; of the other ops those between a fork and the addition that joins it; what is left, each by itself.
    """
    nodes = {node.name: node for node in graph.module.graph.nodes}
    order = {node: i for i, node in enumerate(nodes.values())}
    weighted = {op.name: op for op in graph.ops if op.name in integer_ops and "weight" in op.operands}
    owner = {op.node: op.name for op in graph.ops if op.name in weighted}
    groups: list[tuple[str, list[str], Node]] = []
    if scope == "unit":
        for unit in units(graph):
            members = [op for op in unit.ops if op in weighted]
            if unit.kind != "op" and members:
                groups.append((unit.name, members, _with_addition(nodes[unit.output], members, nodes, graph, order)))
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
    found: list[Part] = []
    for name, members, output in groups:
        part = _part(graph, name, members, _clamped(output), nodes)
        starts = [order[nodes[graph.op(op).node]] for op in members]
        if len(members) > 1 and max(order[read] for read in part.reads) > min(starts):  # the images would be past its ops
            found += [_part(graph, op, [op], _clamped(nodes[graph.op(op).node]), nodes) for op in members]
        else:
            found.append(part)
    products = {op.node for op in graph.ops if op.reduction_size is not None}
    found = [_narrowed(part, order, products) for part in found]
    return sorted(found, key=lambda part: min(order[nodes[graph.op(op).node]] for op in part.ops))


def _part(graph: Graph, name: str, members: Iterable[str], output: Node, nodes: dict[str, Node]) -> Part:
    ops: list[Op] = [graph.op(op) for op in members]
    inner, reads = between([output], [nodes[op.node] for op in ops])
    counts = tuple(read for read in reads if is_count(read))
    tensors = tuple(read for read in reads if not is_count(read))
    return Part(name, tuple(op.name for op in ops), tuple(inner), tensors, counts, sum(op.macs for op in ops))


def is_count(node: Node) -> bool:
    """A size: only the batch has one that is no constant of the graph."""
    return "tensor_meta" not in node.meta and not is_constant(node)


def _with_addition(output: Node, members: list[str], nodes: dict[str, Node], graph: Graph, order: dict[Node, int]) -> Node:
    """The residual addition behind a unit, where its other side is there before the unit; else the output."""
    other = joined(output)
    first = min(order[nodes[graph.op(op).node]] for op in members)
    return next(iter(output.users)) if other is not None and order[other] < first else output


def _clamped(output: Node) -> Node:
    """The clamp behind a node that alone reads it, or the node."""
    users = list(output.users)
    return users[0] if len(users) == 1 and is_call(users[0], *CLAMPS) else output


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


def _narrowed(part: Part, order: dict[Node, int], products: Collection[str]) -> Part:
    """The part with what lies between one value and all that it reads (a layer norm), where no other product is there."""
    passed, left = _behind(set(part.reads), order, products)
    if len(left) > 1 or not passed:
        return part
    nodes = sorted(passed | set(part.nodes), key=order.__getitem__)
    counts = {read for node in nodes for read in node.all_input_nodes if is_count(read)}
    return Part(part.name, part.ops, tuple(nodes), tuple(left), tuple(sorted(counts, key=order.__getitem__)), part.macs)
