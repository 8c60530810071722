"""Rotations of the residual stream and of attention heads: outliers of single channels are spread over all of them.

A layer norm without its scale and shift commutes with every orthogonal matrix that leaves the vector of ones alone: such a
matrix keeps the mean and the length of a row,

    norm(x Q) = norm(x) Q        Q orthogonal, Q 1 = 1

so a stock layer norm stays in the graph (Ashkboos et al. 2024, SliceGPT and QuaRot, turn it into an RMS norm for this). What
writes into the stream is multiplied with Q, what reads it after a norm, with Q too (its inverse is its transpose). Inside of
a head any orthogonal matrix can stand between values and the layer behind attention, and between queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from fewbit.capture.residual import Residual, width_of
from fewbit.capture.structure import heads
from fewbit.core.device import on, wide
from fewbit.core.fx import constant
from fewbit.core.graph import Graph, Op


def orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """An orthogonal matrix drawn uniformly (Haar): QR of normal numbers, with the signs of R's diagonal removed. float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def fixing_ones(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """An orthogonal matrix Q with Q 1 = 1, uniform among those. float64.

    A reflection takes the first axis to the direction of ones; between two of them only the other axes are rotated.
    """
    ones = torch.full((n,), n**-0.5, dtype=torch.float64)
    normal = ones - torch.eye(n, dtype=torch.float64)[0]
    reflection = torch.eye(n, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.dot(normal).clamp_min(1e-30)
    inner = torch.eye(n, dtype=torch.float64)
    inner[1:, 1:] = orthogonal(n - 1, generator)
    return reflection @ inner @ reflection


def rotated(graph: Graph, stream: Residual, seed: int = 0) -> dict[str, Tensor]:
    """Constants of the graph with its residual stream rotated; scales and shifts of the norms go into the layers behind."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    q = on(fixing_ones(stream.width, torch.Generator().manual_seed(seed)), graph.device)
    new: dict[str, Tensor] = {}
    for op in stream.writers:
        for place in (1, 2):
            if (name := _name(nodes[op.node], place)) is not None:
                new[name] = torch.tensordot(q.T, _at(graph, nodes[op.node], place), 1).float()
    for node in stream.constants:
        new[cast(str, node.target)] = (wide(constant(graph.module, node)) @ q).float()
    for norm in stream.norms:
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


def can_rotate(graph: Graph, stream: Residual) -> bool:
    """Whether each layer behind a norm has a bias to take the norm's shift."""
    return all("bias" in op.operands or not bool(_at(graph, n.node, 3).any()) for n in stream.norms for op in n.layers)


def rotated_heads(graph: Graph, seed: int = 0) -> Iterator[tuple[Op, dict[str, Tensor]]]:
    """(layer, changed constants) for the values and for the queries of each attention, every head with its own matrix."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    generator = torch.Generator().manual_seed(seed)
    for h in heads(graph):
        width = width_of(cast(Node, nodes[h.mix.node].args[1]))
        if h.value is not None and h.behind is not None:
            q = _blocks(graph, _at(graph, nodes[h.value.node], 1).shape[0], width, generator)
            behind = nodes[h.behind.node]
            if q is not None and _at(graph, behind, 1).shape[1] == len(q):
                changes = _rotate_output(graph, nodes[h.value.node], q)
                changes[cast(str, _name(behind, 1))] = (_at(graph, behind, 1) @ q).float()
                yield h.value, changes
        if h.query is not None and h.key is not None and h.scores is not None:
            width = width_of(cast(Node, nodes[h.scores.node].args[0]))
            q = _blocks(graph, _at(graph, nodes[h.query.node], 1).shape[0], width, generator)
            if q is not None and _at(graph, nodes[h.key.node], 1).shape[0] == len(q):
                yield h.query, _rotate_output(graph, nodes[h.query.node], q) | _rotate_output(graph, nodes[h.key.node], q)


def _blocks(graph: Graph, outputs: int, width: int, generator: torch.Generator) -> Tensor | None:
    """An orthogonal matrix for each head, along the diagonal."""
    if outputs % width:
        return None
    return on(torch.block_diag(*(orthogonal(width, generator) for _ in range(outputs // width))), graph.device)


def _rotate_output(graph: Graph, node: Node, q: Tensor) -> dict[str, Tensor]:
    """The weight and bias of a layer whose output is to be y Q."""
    names = [(name, place) for place in (1, 2) if (name := _name(node, place)) is not None]
    return {name: (q.T @ _at(graph, node, place)).float() for name, place in names}


def _name(node: Node, place: int) -> str | None:
    argument = node.args[place] if len(node.args) > place else None
    return cast(str, argument.target) if isinstance(argument, Node) else None


def _at(graph: Graph, node: Node, place: int) -> Tensor:
    return wide(constant(graph.module, cast(Node, node.args[place])))
