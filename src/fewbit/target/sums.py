"""The widths of two operands for which no sum of an op can overflow its accumulator, whatever the images are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.capture.sites import tensor_of
from fewbit.core.graph import Graph, Op
from fewbit.core.grid import Grid, safe_terms
from fewbit.core.plan import Fallback
from fewbit.target.grids import OPTIONAL, AllowedGrids
from fewbit.target.spec import Accumulator, OpRule


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


def within_chain(
    graph: Graph, op: Op, rule: OpRule, grids: Mapping[str, AllowedGrids]
) -> tuple[dict[str, AllowedGrids], str, list[Fallback]]:
    """The grids whose products fit in a chain, the reason if there are none, and a fallback for each narrowed site.

    The first pair of grids that fits stays, and of the others those that are no larger: any two of them fit, also where
    another op that reads the tensor takes more away.
    """
    chain_bits, chain = rule.accumulator.chain_bits, rule.accumulator.chain
    assert chain_bits is not None
    assert chain is not None
    names = [op.operands[operand] for operand in op.operands if operand not in OPTIONAL]
    a, b = names[0], names[-1]  # one name where a tensor is multiplied by itself
    terms = min(chain, op.reduction_size or chain)
    pairs = [(g, h) for g in grids[a].grids for h in grids[b].grids if a != b or g == h]
    best = next((pair for pair in pairs if safe_terms(chain_bits, *pair) >= terms), None)
    g, h = pairs[0]
    why = f"{terms} products of {g.bits} by {h.bits} bits do not fit in {chain_bits} bits: {safe_terms(chain_bits, g, h)} do"
    if best is None:
        return {}, why, []
    fitting, fallbacks = _narrowed(graph, op, grids, dict(zip((a, b), best, strict=True)), why)
    return fitting, "", fallbacks


def within_sum(
    graph: Graph, op: Op, rule: OpRule, grids: Mapping[str, AllowedGrids]
) -> tuple[dict[str, AllowedGrids], str, list[Fallback]]:
    """The grids whose sums fit in the accumulator, the reason if there are none, and a fallback for each narrowed site.

    Sums are bounded by the actual numbers of a weight, and by the largest code of an activation.
    """
    names = [op.operands[operand] for operand in op.operands if operand not in OPTIONAL]
    a, b = names[0], names[-1]
    first = (grids[a].grids[0], grids[b].grids[0])
    if rule.accumulator.operand_bits < max(_stored_bits(grid) for grid in first):
        return dict(grids), "", []
    best = narrowed_pair(graph, op, rule.accumulator, grids[a].grids, grids[b].grids, same=a == b)
    bits, terms = rule.accumulator.bits, op.reduction_size
    if best is None:
        g, h = grids[a].grids[-1], grids[b].grids[-1]
        return {}, f"a sum of {terms} products of {g.bits} by {h.bits} bits does not fit in {bits} bits", []
    why = f"a sum of {terms} products of {first[0].bits} by {first[1].bits} bits can leave {bits} bits"
    fitting, fallbacks = _narrowed(graph, op, grids, dict(zip((a, b), best, strict=True)), why)
    return fitting, "", fallbacks


def _narrowed(
    graph: Graph, op: Op, grids: Mapping[str, AllowedGrids], largest: Mapping[str, Grid], why: str
) -> tuple[dict[str, AllowedGrids], list[Fallback]]:
    """The grids no larger than the largest that fits (by site), and a fallback for each site that lost its first grid."""
    fitting, fallbacks = dict(grids), []
    for name, grid in largest.items():
        site_grids = grids[name]
        fitting[name] = replace(site_grids, grids=tuple(g for g in site_grids.grids if g.largest <= grid.largest))
        if (first := fitting[name].grids[0]) != site_grids.grids[0]:
            share = graph.share(op.macs)
            fallbacks.append(Fallback(name, f"{site_grids.grids[0].bits} bits", f"{first.bits} bits", why, share))
    return fitting, fallbacks


def _stored_bits(grid: Grid) -> int:
    return torch.iinfo(grid.container).bits
