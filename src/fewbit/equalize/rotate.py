"""Rotations of the residual stream and of attention heads: outliers of single channels are spread over all of them.

A layer norm without its scale and shift commutes with every orthogonal matrix that leaves the vector of ones alone: such a
matrix keeps the mean and the length of a row,

    norm(x Q) = norm(x) Q        Q orthogonal, Q 1 = 1

so a stock layer norm stays in the graph (Ashkboos et al. 2024, SliceGPT and QuaRot, turn it into an RMS norm for this). What
writes into the stream is multiplied with Q, what reads it behind a norm, with Q too (its inverse is its transpose). Inside of
a head any orthogonal matrix can stand between values and the layer behind attention, and between queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from fewbit.capture.canonicalize import LINEAR
from fewbit.capture.fx import MOVES, argument, aten, constant, is_call, is_constant
from fewbit.core.values import Graph, Op
from fewbit.equalize.structure import Norm, heads, norms, own_weight

ADDS = (aten.add.Tensor,)
ALONG = (aten.select.int, aten.slice.Tensor, aten.expand.default, aten.clone.default, aten.contiguous.default)
CONVS = (aten.conv2d.default,)


@dataclass(frozen=True)
class Residual:
    """The residual stream: the layers and constants that write into it, and the norms that alone read it."""

    width: int
    writers: tuple[Op, ...]
    constants: tuple[Node, ...]
    norms: tuple[Norm, ...]


def orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """An orthogonal matrix drawn evenly (Haar): QR of normal numbers, with the signs of R's diagonal taken out. float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def fixing_ones(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """An orthogonal matrix Q with Q 1 = 1, even among those. float64.

    A reflection takes the first axis to the direction of ones; between two of them only the other axes are rotated.
    """
    ones = torch.full((n,), n**-0.5, dtype=torch.float64)
    away = ones - torch.eye(n, dtype=torch.float64)[0]
    reflection = torch.eye(n, dtype=torch.float64) - 2 * torch.outer(away, away) / away.dot(away).clamp_min(1e-30)
    inner = torch.eye(n, dtype=torch.float64)
    inner[1:, 1:] = orthogonal(n - 1, generator)
    return reflection @ inner @ reflection


def residual(graph: Graph) -> Residual | None:
    """The residual stream of a transformer; None where anything but layer norms reads it, or anything but layers writes it."""
    by_node = {op.node: op for op in graph.ops}
    known = {norm.node: norm for norm in norms(graph)}
    if not known:
        return None
    width = _width(next(iter(known)))
    writers: dict[str, Op] = {}
    constants: dict[Node, None] = {}
    read: dict[Node, Norm] = {}
    pending, seen = [cast(Node, norm.args[0]) for norm in known], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if _width(node) != width:
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


def rotated(graph: Graph, found: Residual, seed: int = 0) -> dict[str, Tensor]:
    """Constants of the graph with its residual stream rotated; scales and shifts of the norms go into the layers behind."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    q = fixing_ones(found.width, torch.Generator().manual_seed(seed))
    new: dict[str, Tensor] = {}
    for op in found.writers:
        for place in (1, 2):
            if (name := _name(nodes[op.node], place)) is not None:
                new[name] = torch.tensordot(q.T, _at(graph, nodes[op.node], place), 1).float()
    for node in found.constants:
        new[cast(str, node.target)] = (constant(graph.module, node).double() @ q).float()
    for norm in found.norms:
        scale, shift = _at(graph, norm.node, 2), _at(graph, norm.node, 3)
        new[cast(str, _name(norm.node, 2))] = torch.ones_like(scale).float()
        new[cast(str, _name(norm.node, 3))] = torch.zeros_like(shift).float()
        for op in norm.layers:
            node = nodes[op.node]
            w = _at(graph, node, 1)
            new[cast(str, _name(node, 1))] = (w * scale @ q).float()
            if (name := _name(node, 2)) is not None:
                new[name] = (_at(graph, node, 2) + w @ shift).float()
    return new


def can_rotate(graph: Graph, found: Residual) -> bool:
    """Whether each layer behind a norm has a bias to take the norm's shift."""
    return all("bias" in op.operands or not bool(_at(graph, n.node, 3).any()) for n in found.norms for op in n.layers)


def rotated_heads(graph: Graph, seed: int = 0) -> Iterator[tuple[Op, dict[str, Tensor]]]:
    """(layer, changed constants) for the values and for the queries of each attention, every head with its own matrix."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    generator = torch.Generator().manual_seed(seed)
    for h in heads(graph):
        width = _width(cast(Node, nodes[h.mix.node].args[1]))
        if h.value is not None and h.behind is not None:
            q = _blocks(_at(graph, nodes[h.value.node], 1).shape[0], width, generator)
            behind = nodes[h.behind.node]
            if q is not None and _at(graph, behind, 1).shape[1] == len(q):
                changes = _written(graph, nodes[h.value.node], q)
                changes[cast(str, _name(behind, 1))] = (_at(graph, behind, 1) @ q).float()
                yield h.value, changes
        if h.query is not None and h.key is not None and h.scores is not None:
            width = _width(cast(Node, nodes[h.scores.node].args[0]))
            q = _blocks(_at(graph, nodes[h.query.node], 1).shape[0], width, generator)
            if q is not None and _at(graph, nodes[h.key.node], 1).shape[0] == len(q):
                yield h.query, _written(graph, nodes[h.query.node], q) | _written(graph, nodes[h.key.node], q)


def _blocks(outputs: int, width: int, generator: torch.Generator) -> Tensor | None:
    """An orthogonal matrix for each head, along the diagonal."""
    if outputs % width:
        return None
    return torch.block_diag(*(orthogonal(width, generator) for _ in range(outputs // width)))


def _written(graph: Graph, node: Node, q: Tensor) -> dict[str, Tensor]:
    """The weight and bias of a layer whose output is to be y Q."""
    names = [(name, place) for place in (1, 2) if (name := _name(node, place)) is not None]
    return {name: (q.T @ _at(graph, node, place)).float() for name, place in names}


def _sources(node: Node) -> list[Node] | None:
    """What a node of the stream is put together from; None for one that is no addition, row or list of rows of it."""
    if is_call(node, *ADDS) and not node.kwargs.get("alpha") and all(isinstance(a, Node) for a in node.args[:2]):
        return [cast(Node, a) for a in node.args[:2]]
    if is_call(node, aten.cat.default):
        axis = cast(int, argument(node, 1, "dim", 0))
        return list(cast("list[Node]", node.args[0])) if axis not in (-1, _rank(node) - 1) else None
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


def _width(node: Node) -> int:
    value: Any = constant(node.graph.owning_module, node) if is_constant(node) else node.meta["tensor_meta"]  # type: ignore[arg-type]
    return int(value.shape[-1])


def _rank(node: Node) -> int:
    return len(node.meta["tensor_meta"].shape)


def _name(node: Node, place: int) -> str | None:
    found = node.args[place] if len(node.args) > place else None
    return cast(str, found.target) if isinstance(found, Node) else None


def _at(graph: Graph, node: Node, place: int) -> Tensor:
    return constant(graph.module, cast(Node, node.args[place])).double()
