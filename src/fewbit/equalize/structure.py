"""Where channels can be moved: tensors that only layers with constant weights read, found from structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch.fx import Node

from fewbit.capture.canonicalize import LINEAR
from fewbit.capture.fx import MOVES, SCALINGS, aten, is_call, is_constant, is_scaling
from fewbit.core.values import Graph, Op

ROWS = (aten.select.int, aten.slice.Tensor, aten.mean.dim, aten.clone.default, aten.contiguous.default)  # keep channels last


@dataclass(frozen=True)
class Norm:
    """A layer norm with weight and bias, and the linear layers that alone read it."""

    node: Node
    layers: tuple[Op, ...]


@dataclass(frozen=True)
class Heads:
    """A product of attention: the layers that make its values, keys and queries, and the layer behind it; None where a path
    between is more than views (and, for queries and keys, scalings).
    """

    mix: Op
    value: Op | None
    behind: Op | None
    scores: Op | None
    query: Op | None
    key: Op | None


def norms(graph: Graph) -> list[Norm]:
    """The layer norms whose scale can go into the layers behind them."""
    by_node = {op.node: op for op in graph.ops}
    found = []
    for node in graph.module.graph.nodes:
        if not is_call(node, aten.layer_norm.default) or len(node.args) < 4:
            continue
        if len(cast("list[int]", node.args[1])) != 1 or not all(_own(constant) for constant in node.args[2:4]):
            continue
        layers = _only_layers(node, by_node)
        if layers and all(own_weight(graph, op) for op in layers):
            found.append(Norm(node, tuple(layers)))
    return found


def heads(graph: Graph) -> list[Heads]:
    """Attention's products, in graph order."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    by_node = {op.node: op for op in graph.ops}
    found = []
    for op in graph.ops:
        if "probs" not in op.operands:
            continue
        mix = nodes[op.node]
        value, behind = _layer_before(graph, mix.args[1], by_node, scaled=False), _layer_behind(graph, mix, by_node)
        scores = _scores(mix, by_node)
        query = key = None
        if scores is not None:
            product = nodes[scores.node]
            query, key = (_layer_before(graph, side, by_node, scaled=True) for side in product.args[:2])
        distinct = query is None or key is None or query.name != key.name
        found.append(Heads(op, value, behind, scores, query if distinct else None, key if distinct else None))
    return found


def own_weight(graph: Graph, op: Op) -> bool:
    """A layer whose weight and bias nobody else reads."""
    node = next(n for n in graph.module.graph.nodes if n.name == op.node)
    return _own(node.args[1]) and (len(node.args) < 3 or node.args[2] is None or _own(node.args[2]))


def _own(node: object) -> bool:
    if not isinstance(node, Node) or not is_constant(node) or len(node.users) != 1:
        return False
    return sum(n.op == "get_attr" and n.target == node.target for n in node.graph.nodes) == 1


def _only_layers(node: Node, by_node: Mapping[str, Op]) -> list[Op]:
    """The linear layers that read a tensor, some of its rows or their mean; none where anything else reads it."""
    found, pending = [], list(node.users)
    while pending:
        user = pending.pop()
        if user.name in by_node and is_call(user, LINEAR):
            found.append(by_node[user.name])
        elif is_call(user, *ROWS) and _keeps_channels(user):
            pending += user.users
        else:
            return []
    return found


def _keeps_channels(node: Node) -> bool:
    rank = len(getattr(cast(Node, node.args[0]).meta.get("tensor_meta"), "shape", ()))
    dims = node.args[1] if len(node.args) > 1 else []
    listed = [dims] if isinstance(dims, int) else list(cast("list[int]", dims or []))
    if is_call(node, aten.mean.dim) and not listed:
        return False
    return all(d % rank != rank - 1 for d in listed)


def _layer_before(graph: Graph, start: object, by_node: Mapping[str, Op], *, scaled: bool) -> Op | None:
    node = start
    while isinstance(node, Node) and len(node.users) == 1:
        if node.name in by_node:
            op = by_node[node.name]
            return op if is_call(node, LINEAR) and own_weight(graph, op) else None
        if not is_call(node, *MOVES) and not (scaled and is_scaling(node)):
            return None
        node = node.args[0]
    return None


def _layer_behind(graph: Graph, mix: Node, by_node: Mapping[str, Op]) -> Op | None:
    node = mix
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.name in by_node:
            return by_node[node.name] if is_call(node, LINEAR) and own_weight(graph, by_node[node.name]) else None
        if not is_call(node, *MOVES):
            return None
    return None


def _scores(mix: Node, by_node: Mapping[str, Op]) -> Op | None:
    """The product before the softmax, with nothing between them but scalings and views."""
    node = cast(Node, cast(Node, mix.args[0]).args[0])
    while isinstance(node, Node):
        if node.name in by_node:
            return by_node[node.name] if "query" in by_node[node.name].operands else None
        if not is_call(node, *MOVES, *SCALINGS, aten.softmax.int) or len(node.users) != 1:
            return None
        node = cast(Node, node.args[0])
    return None
