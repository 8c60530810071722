"""Concatenations whose parts differ: one step for all is that of the widest, and may leave little of a narrow one."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch.fx import Node

from fewbit.capture.kinds import CLAMPS, MAX_POOLS, PADS
from fewbit.capture.normalize import TURNS
from fewbit.core.fx import VIEWS, is_call, reached
from fewbit.core.graph import Graph, Op
from fewbit.core.grid import Grid, fake, qparams_from_range
from fewbit.core.plan import Fallback
from fewbit.observe.stats import Histogram, Stats
from fewbit.target.allowed import Allowed
from fewbit.target.spec import Target

LIMIT = 0.05  # of a part's own spread, that its mean error may be under the step of all parts
LOST = 2  # times the error under a step of its own, from which on the common one is at fault


def apart(graph: Graph, target: Target, answer: Allowed, stats: Stats) -> dict[str, str]:
    """Integer concatenations that are better float, and why: a part suffers, and no product reads the codes of the whole."""
    found = {}
    for op in graph.ops:
        if op.kind != "concat" or op.name not in answer.integer_ops or _products(graph, target, answer, op):
            continue
        if why := suffering(op, answer.grids[op.operands["output"]], stats):
            found[op.name] = why
    return found


def joined(graph: Graph, target: Target, answer: Allowed, stats: Stats) -> list[Fallback]:
    """A fallback for each concatenation with a part that suffers where a product in integers reads the whole with one step."""
    fallbacks = []
    for op in graph.ops:
        products = _products(graph, target, answer, op) if op.kind == "concat" else []
        if products:
            grid = answer.grids[next(iter(products[0].operands.values()))]
            if why := suffering(op, grid, stats):
                share = graph.share(sum(product.macs for product in products))
                read = ", ".join(product.name for product in products)
                fallbacks.append(Fallback(op.name, "a step for each part", f"one step, which {read} needs", why, share))
    return fallbacks


def suffering(op: Op, grid: Grid, stats: Stats) -> str:
    """The part of a concatenation that loses most of its own spread to one step for all, in words; empty where all bear it."""
    parts = {name: stats.sites[site] for name, site in op.operands.items() if name != "output" and site in stats.sites}
    whole = reduce(Histogram.merge, parts.values(), Histogram())
    losses = {}
    for name, part in parts.items():
        error = _error(part, whole, grid)
        if part.variance > 0 and error > LOST * _error(part, part, grid):
            losses[name] = error / part.variance**0.5
    worst = max(losses, key=losses.__getitem__, default="")
    if not worst or losses[worst] <= LIMIT:
        return ""
    part = parts[worst]
    return (
        f"with one step for all parts, {op.operands[worst]} ({part.low:.3g} to {part.high:.3g}) has an error of "
        f"{100 * losses[worst]:.0f} % of its own spread"
    )


def _error(part: Histogram, whole: Histogram, grid: Grid) -> float:
    """The root of a part's mean squared error under the scale that holds the range of the whole."""
    qparams = qparams_from_range(torch.tensor(whole.low), torch.tensor(whole.high), replace(grid, axis=None))
    x = part.centers.float()
    error = (fake(x, qparams, replace(grid, axis=None)) - x).double().square()
    return float((error * part.counts).sum() / max(part.count, 1)) ** 0.5


def _products(graph: Graph, target: Target, answer: Allowed, op: Op) -> list[Op]:
    """The integer ops that read the whole of a tensor with one step, whoever made it: through views, paddings, maxima, clamps
    and ops that only follow. What reads a slice may have a step of its own.
    """
    by_node = {other.node: other for other in graph.ops if other.name in answer.integer_ops}
    products = {name for name, other in by_node.items() if target.rules(other.kind)[0].runs != "follow"}

    def goes_on(node: Node) -> bool:
        return node.name not in products and (node.name in by_node or is_call(node, *VIEWS, *TURNS, *PADS, *MAX_POOLS, *CLAMPS))

    start = next(node for node in graph.module.graph.nodes if node.name == graph.site(op.operands["output"]).tensor)
    return [by_node[node.name] for node in reached(start, goes_on) if node.name in products]
