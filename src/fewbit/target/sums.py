"""The widths of two operands for which no sum of an op can overflow its accumulator, whatever the images are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.core.graph import Graph, Op
from fewbit.core.grid import Grid, safe_terms
from fewbit.target.spec import Accumulator


def narrowed_pair(
    graph: Graph, op: Op, accumulator: Accumulator, a: Sequence[Grid], b: Sequence[Grid], *, same: bool = False
) -> tuple[Grid, Grid] | None:
    """The widest pair of grids of an op's two operands whose sums fit: the first of each where they do.

    Else the pair whose narrower operand is widest, then the one with more bits in all, then the one with more in the first
    (an activation: a weight loses less: its channels have own scales). None where no pair fits. With `same` both operands
    are one tensor, and so have one grid.
    """
    limit = largest_sum(accumulator)
    pairs = [(g, h) for g in a for h in b if not same or g == h]
    pairs = pairs[:1] + sorted(pairs, key=lambda p: (min(p[0].bits, p[1].bits), p[0].bits + p[1].bits, p[0].bits), reverse=True)
    terms = op.reduction_size or 0
    rows: Tensor | None = None
    for g, h in pairs:
        if terms <= safe_terms(accumulator.bits, g, h):
            return g, h
        if "weight" in op.operands:
            if rows is None:
                rows = tensor_of(graph, graph.site(op.operands["weight"])).flatten(1).double()
            if g.largest * int(_worst(rows, h)) <= limit:
                return g, h
    return None


def largest_sum(accumulator: Accumulator) -> int:
    """The largest magnitude of a sum that an accumulator holds with either sign."""
    return int(2 ** (accumulator.bits - 1) - 1)


def _worst(rows: Tensor, grid: Grid) -> Tensor:
    """The largest sum of magnitudes of codes over channels, with scales that cover the whole range of the weight."""
    top = rows.abs().amax() if grid.axis is None else rows.abs().amax(1, keepdim=True)
    scale = (top / (grid.high * max(grid.multiples, 1))).clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / scale).round().abs().sum(1).max()
