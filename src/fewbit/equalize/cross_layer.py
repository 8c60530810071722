"""Convolutions with a ReLU between them: a channel is divided by a number here and multiplied by it there.

Nagel et al. 2019 (data-free quantization, section 4.1). ReLU is positively homogeneous; a clamp at 6 is not, and is left alone.
Each output channel of a weight has its own step, so what is gained is the range of the tensor between, which has one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import Node

from fewbit.capture.fx import aten, constant, is_call
from fewbit.core.grid import Grid
from fewbit.core.values import Graph, Op
from fewbit.equalize.migrate import STRENGTHS, Migration, scales
from fewbit.equalize.structure import own_weight

CONVS = ("conv", "depthwise")


@dataclass(frozen=True)
class Pair:
    """Two convolutions and the tensor between them, which nobody else reads."""

    first: Op
    second: Op
    between: Node


def pairs(graph: Graph) -> list[Pair]:
    """Convolutions without groups, or depthwise, that follow each other directly or through a ReLU."""
    by_node, found = {op.node: op for op in graph.ops}, []
    nodes = {node.name: node for node in graph.module.graph.nodes}
    for op in graph.ops:
        node = nodes[op.node]
        if op.kind not in CONVS or len(node.users) != 1:
            continue
        between, user = node, next(iter(node.users))
        if is_call(user, aten.relu.default) and len(user.users) == 1:
            between, user = user, next(iter(user.users))
        second = by_node.get(user.name)
        if second is None or second.kind not in CONVS or user.args[0] is not between:
            continue
        w = constant(graph.module, cast(Node, user.args[1]))
        plain = second.kind == "depthwise" and w.shape[0] == between.meta["tensor_meta"].shape[1]
        plain = plain or w.shape[1] == between.meta["tensor_meta"].shape[1]
        if plain and own_weight(graph, op) and own_weight(graph, second):
            found.append(Pair(op, second, between))
    return found


def balanced(
    low: Float[Tensor, "c"], high: Float[Tensor, "c"], squares: Float[Tensor, "c"], w: Tensor, activation: Grid, weight: Grid
) -> Migration:
    """The strength with the smallest expected squared error of the second convolution's output.

    `low`, `high` and `squares` (mean of squares) are those of the channels between, w is (c_out, c_in, kh, kw). Rounding errors
    are taken for uniform: step² / 12 for each element that an output sums.
    """
    reach = torch.maximum(-low, high)
    reach = reach.clamp_min(float(reach.mean()) * 1e-3 + 1e-30)
    depthwise = w.shape[1] == 1 and w.shape[0] == len(low)

    def error(scale: Tensor) -> float:
        step = float((high / scale).amax().clamp_min(0) - (low / scale).amin().clamp_max(0)) / (
            activation.high - activation.low
        )
        heavier = w * scale.view(-1, 1, 1, 1) if depthwise else w * scale.view(1, -1, 1, 1)
        through = step**2 * float(heavier.square().sum())
        steps = heavier.flatten(1).abs().amax(1) / weight.high
        kernel = math.prod(w.shape[2:])
        read = squares / scale.square()
        summed = (steps.square() * read).sum() if depthwise else steps.square().sum() * read.sum()
        return (through + kernel * float(summed)) / 12

    tried: list[tuple[float | None, Tensor]] = [(None, torch.ones_like(reach))]
    tried += [(strength, scales(reach, strength)) for strength in STRENGTHS]
    errors = [error(scale) for _, scale in tried]
    best = min(range(len(errors)), key=errors.__getitem__)
    return Migration(tried[best][1], torch.zeros_like(reach), tried[best][0], errors[0], errors[best])
