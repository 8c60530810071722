"""A plan in one call, what most tests begin with, and what can be asked of any plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fewbit.choose import Context, Recipe, choose
from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.execute.simulate import simulate
from fewbit.observe import Stats
from fewbit.target import Target


def context_for(
    graph: Graph, stats: Stats, target: Target, *, images: Iterable[Tensor] = (), keep_float: Iterable[str] = (), **options: Any
) -> Context:
    """What passes read, with the options of Context."""
    return Context(graph, stats, target, images=list(images), keep_float=tuple(keep_float), **options)


def plan_for(graph: Graph, stats: Stats, target: Target, recipe: Recipe, **options: Any) -> Plan:
    """The plan of a recipe."""
    return choose(context_for(graph, stats, target, **options), recipe)


def numbers(plan: Plan) -> dict[str, Any]:
    """What a plan decides, without its records: of each site grid, scale, zero point and codes, of each op its bias."""
    chosen = plan.choices | {f"{op}, bias": b.integer for op, b in plan.biases.items() if b.integer is not None}
    sites = {name: (c.grid, c.qparams, None if c.codes is None else c.codes.tolist()) for name, c in chosen.items()}
    return sites | {op: bias.values.tolist() for op, bias in plan.biases.items()}


def kl(graph: Graph, plan: Plan, images: Tensor, batch: int = 16) -> float:
    """torch's own KL divergence of what a plan's simulation answers from what the float model does."""
    simulation = simulate(graph, plan)
    with torch.no_grad():
        answers = (torch.cat([m(x) for x in images.split(batch)]) for m in (graph.module, simulation))
        exact, found = (y.double().log_softmax(1) for y in answers)
    return kl_div(found, exact, log_target=True, reduction="batchmean").item()
