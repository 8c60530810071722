"""Modules of a model that get one width each: an attention module, an MLP, or an op that belongs to neither.

Found from structure: the layers that an attention's products are made of and the one behind them; layers that follow each
other through activations and views alone. Names only say what a unit is called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

from torch.fx import Node

from fewbit.capture.canonicalize import DROPOUTS, SOFTMAX
from fewbit.capture.fx import MOVES, aten, is_call, is_constant
from fewbit.capture.sites import LOGIT_PATH, WEIGHTED
from fewbit.core.values import Graph, Op

# what may stand between two layers of one MLP: activations, gates, views
BETWEEN: set[Callable[..., Any]] = {
    *MOVES,
    *DROPOUTS,
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.hardswish.default,
    aten.tanh.default,
    aten.mul.Tensor,
}


@dataclass(frozen=True)
class Unit:
    """Ops that share a width. `output` is the node of what the last of them gives, `map` that of the probabilities of
    attention (b, heads, queries, keys).
    """

    name: str
    kind: Literal["attention", "mlp", "op"]
    ops: tuple[str, ...]
    output: str
    map: str | None = None


def units(graph: Graph) -> tuple[Unit, ...]:
    """The units of a graph in graph order; every op with a weight and every product belongs to exactly one."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    by_node = {op.node: op for op in graph.ops}
    found: list[Unit] = []
    taken: set[str] = set()
    for op in graph.ops:
        if "probs" not in op.operands:
            continue
        softmax = next(_back(nodes[op.node].args[0], lambda n: is_call(n, *SOFTMAX), lambda n: is_call(n, *MOVES)), None)
        if softmax is None:
            continue
        members = _attention(graph, nodes, by_node, op, softmax) - taken
        taken |= members
        found.append(_unit(graph, "attention", members, softmax.name))
    groups: dict[str, set[str]] = {}
    for op in graph.ops:  # in graph order: what an op reads has its group already
        if op.name in taken or (op.kind not in WEIGHTED and op.kind != "matmul"):
            continue
        group = {op.name}
        if op.kind == "linear":
            for name in _layers_before(nodes[op.node].args[0], by_node, BETWEEN):
                group |= groups.get(name, set())
        for name in group:
            groups[name] = group
    for group in {id(group): group for group in groups.values()}.values():
        found.append(_unit(graph, "mlp" if len(group) > 1 else "op", group))
    place = {op.name: i for i, op in enumerate(graph.ops)}
    shared = Counter(unit.name for unit in found)
    named = [replace(u, name=f"{u.name}.{u.kind}") if shared[u.name] > 1 else u for u in found]
    return tuple(sorted(named, key=lambda unit: place[unit.ops[0]]))


def _attention(graph: Graph, nodes: Mapping[str, Node], by_node: Mapping[str, Op], mix: Op, softmax: Node) -> set[str]:
    """The two products around a softmax, the layers that make their operands, and the layer behind them."""
    members = {mix.name}
    starts: list[Any] = [nodes[mix.node].args[1]]
    for node in _back(softmax.args[0], lambda n: n.name in by_node and "query" in by_node[n.name].operands, _is_logit):
        members.add(by_node[node.name].name)
        starts += node.args[:2]
    for start in starts:
        members |= _layers_before(start, by_node, None)
    pending = list(nodes[mix.node].users)
    while pending:
        user = pending.pop()
        if user.name in by_node and by_node[user.name].kind == "linear":
            members.add(by_node[user.name].name)
        elif is_call(user, *MOVES, *DROPOUTS):
            pending += user.users
    return members


def _is_heads(node: Node) -> bool:
    """A tensor (b, heads, tokens, d), not the residual stream."""
    return len(getattr(node.meta.get("tensor_meta"), "shape", ())) == 4


def _is_logit(node: Node) -> bool:
    return is_call(node, *LOGIT_PATH)


def _layers_before(start: Any, by_node: Mapping[str, Op], through: set[Callable[..., Any]] | None) -> set[str]:
    """The nearest linear layers behind a value; with `through` None, through whatever is no op and the sums of rotations."""

    def is_layer(node: Node) -> bool:
        return node.name in by_node and by_node[node.name].kind == "linear"

    def passes(node: Node) -> bool:
        if through is not None:
            return node.name not in by_node and is_call(node, *through)
        return node.name not in by_node or (by_node[node.name].kind == "add" and _is_heads(node))

    return {by_node[node.name].name for node in _back(start, is_layer, passes)}


def _back(start: Any, wanted: Callable[[Node], bool], passes: Callable[[Node], bool]) -> Iterator[Node]:
    """The nearest nodes behind a value that are wanted, through nodes that may be passed."""
    pending, seen = [start], set[Node]()
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in seen or is_constant(node):
            continue
        seen.add(node)
        if wanted(node):
            yield node
        elif passes(node):
            pending += node.all_input_nodes


def _unit(graph: Graph, kind: Literal["attention", "mlp", "op"], members: set[str], probabilities: str | None = None) -> Unit:
    ops = tuple(op.name for op in graph.ops if op.name in members)
    columns = zip(*(op.split(".") for op in ops), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
    return Unit(".".join(shared) or ops[0], kind, ops, graph.op(ops[-1]).node, probabilities)
