"""The structure of a graph: modules (attention, MLP), the products of attention and what makes their operands, layer norms
and their readers. Names only say what something is called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, cast

from torch.fx import Node

from fewbit.capture.canonicalize import LINEAR, SOFTMAX
from fewbit.capture.kinds import KINDS, LOGIT_PATH, by_rows, shape_for_one, softmax_behind
from fewbit.core.fx import MOVES, SCALINGS, aten, is_call, is_constant, is_scaling, reached
from fewbit.core.graph import Graph, Op

# what may stand between two layers of one MLP: activations, gates, views
BETWEEN: set[Callable[..., Any]] = {
    *MOVES,
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
ROWS = (aten.select.int, aten.slice.Tensor, aten.mean.dim, aten.clone.default, aten.contiguous.default)  # keep channels last


@dataclass(frozen=True)
class Module:
    """An attention module, an MLP, or an op that belongs to neither: ops that share a width. `output` is the node of what the
    last of them gives, `map` that of the probabilities of attention (b, heads, queries, keys).
    """

    name: str
    kind: Literal["attention", "mlp", "op"]
    ops: tuple[str, ...]
    output: str
    map: str | None = None


def modules(graph: Graph) -> tuple[Module, ...]:
    """The modules of a graph in graph order; every op with a weight and every product belongs to exactly one."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    by_node = {op.node: op for op in graph.ops}
    result: list[Module] = []
    assigned: set[str] = set()
    for op in graph.ops:
        if "probs" not in op.operands:
            continue
        softmax = softmax_behind(nodes[op.node].args[0])
        if softmax is None:
            continue
        members = _attention(nodes, by_node, op, softmax) - assigned
        assigned |= members
        result.append(_module(graph, "attention", members, softmax.name))
    groups: dict[str, set[str]] = {}
    for op in graph.ops:  # in graph order: what an op reads has its group already
        if op.name in assigned or not KINDS[op.kind].product:
            continue
        group = {op.name}
        if op.kind == "linear":
            for name in _layers_before(nodes[op.node].args[0], by_node, BETWEEN):
                group |= groups.get(name, set())
        for name in group:
            groups[name] = group
    for group in {id(group): group for group in groups.values()}.values():
        result.append(_module(graph, "mlp" if len(group) > 1 else "op", group))
    place = {op.name: i for i, op in enumerate(graph.ops)}
    shared = Counter(module.name for module in result)
    named = [replace(u, name=f"{u.name}.{u.kind}") if shared[u.name] > 1 else u for u in result]
    return tuple(sorted(named, key=lambda module: place[module.ops[0]]))


def _attention(nodes: Mapping[str, Node], by_node: Mapping[str, Op], mix: Op, softmax: Node) -> set[str]:
    """The two products around a softmax, the layers that make their operands, and the layer behind them."""
    members = {mix.name}
    starts: list[Any] = [nodes[mix.node].args[1]]
    for node in _back(
        softmax.args[0], lambda n: n.name in by_node and "query" in by_node[n.name].operands, lambda n: is_call(n, *LOGIT_PATH)
    ):
        members.add(by_node[node.name].name)
        starts += node.args[:2]
    for start in starts:
        members |= _layers_before(start, by_node, None)
    behind = reached(nodes[mix.node], lambda user: is_call(user, *MOVES) or by_rows(user))
    return members | {by_node[n.name].name for n in behind if n.name in by_node and by_node[n.name].kind == "linear"}


def _layers_before(start: Any, by_node: Mapping[str, Op], through: set[Callable[..., Any]] | None) -> set[str]:
    """The nearest linear layers behind a value; with `through` None, through all that are no ops and the sums of rotations."""

    def is_layer(node: Node) -> bool:
        return node.name in by_node and by_node[node.name].kind == "linear"

    def passes(node: Node) -> bool:
        if through is not None:
            return node.name not in by_node and is_call(node, *through)
        heads = len(shape_for_one(node)) == 4  # (b, heads, tokens, d), not the residual stream
        return node.name not in by_node or (by_node[node.name].kind == "add" and heads)

    return {by_node[node.name].name for node in _back(start, is_layer, passes)}


def _back(start: Any, is_target: Callable[[Node], bool], passes: Callable[[Node], bool]) -> Iterator[Node]:
    """The nearest target nodes behind a value, searched through the nodes that may be passed."""
    pending, visited = [start], set[Node]()
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in visited or is_constant(node):
            continue
        visited.add(node)
        if is_target(node):
            yield node
        elif passes(node):
            pending += node.all_input_nodes


def _module(graph: Graph, kind: Literal["attention", "mlp", "op"], members: set[str], softmax: str | None = None) -> Module:
    ops = tuple(op.name for op in graph.ops if op.name in members)
    columns = zip(*(op.split(".") for op in ops), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
    return Module(".".join(shared) or ops[0], kind, ops, graph.op(ops[-1]).node, softmax)


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
    result = []
    for node in graph.module.graph.nodes:
        if not is_call(node, aten.layer_norm.default) or len(node.args) < 4:
            continue
        if len(cast("list[int]", node.args[1])) != 1 or not all(_own(constant) for constant in node.args[2:4]):
            continue
        layers = _only_layers(node, by_node)
        if layers and all(own_weight(graph, op) for op in layers):
            result.append(Norm(node, tuple(layers)))
    return result


def heads(graph: Graph) -> list[Heads]:
    """Attention's products, in graph order."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    by_node = {op.node: op for op in graph.ops}
    result = []
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
        result.append(Heads(op, value, behind, scores, query if distinct else None, key if distinct else None))
    return result


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
    layers, pending = [], list(node.users)
    while pending:
        user = pending.pop()
        if user.name in by_node and is_call(user, LINEAR):
            layers.append(by_node[user.name])
        elif is_call(user, *ROWS) and _keeps_channels(user):
            pending += user.users
        else:
            return []
    return layers


def _keeps_channels(node: Node) -> bool:
    rank = len(shape_for_one(cast(Node, node.args[0])))
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
        if not is_call(node, *MOVES) and not by_rows(node):
            return None
    return None


def _scores(mix: Node, by_node: Mapping[str, Op]) -> Op | None:
    """The product before the softmax, with nothing between them but scalings and views."""
    node = cast(Node, cast(Node, softmax_behind(mix.args[0])).args[0])
    while isinstance(node, Node):
        if node.name in by_node:
            return by_node[node.name] if "query" in by_node[node.name].operands else None
        if not is_call(node, *MOVES, *SCALINGS) or len(node.users) != 1:
            return None
        node = cast(Node, node.args[0])
    return None


@dataclass(frozen=True)
class Projection:
    """A linear layer whose output is an operand of a product of attention scores: on which side, the product, the views and
    scalings on the way, and what the product is multiplied by before the softmax.
    """

    side: str
    product: Node
    path: tuple[Node, ...]
    scale: float


def projections(graph: Graph) -> dict[str, Projection]:
    """The linear ops whose output reaches a query or key operand through views and scalings alone, by name.

    A layer that reaches both sides (queries and keys in one matrix) is left out: neither side is float.
    """
    nodes = {node.name: node for node in graph.module.graph.nodes}
    linears = {op.node: op.name for op in graph.ops if op.kind == "linear"}
    by_layer: dict[str, Projection] = {}
    shared = set()
    for op in graph.ops:
        if "query" not in op.operands:
            continue
        product = nodes[op.node]
        scale = scale_behind(product)
        for side, operand in zip(("query", "key"), product.args[:2], strict=True):
            path, node = [], cast(Node, operand)
            while is_call(node, *MOVES) or is_scaling(node):
                path.append(node)
                node = cast(Node, node.args[0])
            if node.name not in linears or not _shapes_are_known(path):
                continue
            name = linears[node.name]
            if name in by_layer:
                shared.add(name)
            by_layer[name] = Projection(side, product, tuple(reversed(path)), scale)
    return {name: score for name, score in by_layer.items() if name not in shared and _is_tokens(nodes[graph.op(name).node])}


def _is_tokens(linear: Node) -> bool:
    """The input has one row of tokens for each image."""
    shape = shape_for_one(cast(Node, linear.args[0]))
    return len(shape) == 3 and shape[0] == 1 and not is_constant(linear.args[0])


def scale_behind(product: Node) -> float:
    """The numbers that the product is multiplied by on its way to the softmax."""
    scale, node = 1.0, product
    while len(node.users) == 1:
        node = next(iter(node.users))
        if is_scaling(node):
            scale = scale * cast(float, node.args[1]) if is_call(node, *SCALINGS[:2]) else scale / cast(float, node.args[1])
        elif is_call(node, *SOFTMAX):
            break
    return float(scale)


def _shapes_are_known(path: list[Node]) -> bool:
    """No shape on the path depends on anything but the number of images."""
    return all(is_call(n, aten.sym_size.int) and n.args[1] == 0 for node in path for n in node.all_input_nodes[1:])
