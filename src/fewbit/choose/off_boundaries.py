"""A scale on which many numbers stand exactly between two codes is moved by a thousandth.

What is the same for every image may do so: where queries start at zero, attention gives each of them the same mean of codes,
and on a scale that is equal to theirs 3/4 of 2 codes is 1.5. The order of a float32 sum decides such a code, on all images
together, and runtimes add in other orders than the simulation (verify/ties.py counts it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context
from fewbit.core.checks import crowded
from fewbit.core.grid import Grid, QParams
from fewbit.core.inputs import Batch
from fewbit.core.plan import Choice, Plan
from fewbit.execute.simulate import Simulation, SiteTrace, simulate, trace

REACH = 2e-4  # of a code around a boundary; float32 moves a position by less
MOVE = 1e-3  # of a scale: what stands between code 0 and its neighbour moves by half of that, out of reach
IMAGES = 4  # that are looked at
WHY = f"scale moved by {100 * MOVE:g} %: many numbers stood exactly between two codes"
SITES = 8  # that are moved at most: each changes what stands behind it, so all are looked at again


def off_boundaries(plan: Plan, context: Context) -> Plan:
    """The plan with another scale for each activation, up to `SITES`, that has more numbers on boundaries than chance brings;
    the same plan where there are no images.
    """
    if not context.images:
        return plan
    images = context.batched(IMAGES)[0]
    moved = set[str]()
    while len(moved) < SITES:
        free = {name: one for name, one in plan.choices.items() if _may_move(one) and name not in moved}
        site = _first(simulate(context.graph, plan), images, free)
        if site is None:
            break
        builder, old = PlanBuilder(plan, context), free[site]
        qparams = QParams(old.qparams.scale * (1 + MOVE), old.qparams.zero)
        builder.set(replace(old, qparams=qparams, why=f"{old.why} {WHY}".strip()))
        plan = builder.plan()
        moved.add(site)
    return plan


def _may_move(choice: Choice) -> bool:
    """Whether it is of an activation with a scale of its own; float32 has too few digits behind codes of more bits."""
    return choice.codes is None and choice.is_free and choice.grid.bits <= 16


def _first(module: Simulation, images: Batch, free: Mapping[str, Choice]) -> str | None:
    """The first site of `free`, as the graph computes them, with more numbers between two codes than chance brings."""
    found = list[str]()

    def look(site: str, ours: SiteTrace) -> None:
        if site in free and not found and _on_boundaries(free[site].grid, ours.position):
            found.append(site)

    trace(module, images, seen=look)
    return found[0] if found else None


def _on_boundaries(grid: Grid, position: Tensor) -> bool:
    """Whether more numbers than chance brings stand between two codes, by their positions among the codes, of any shape."""
    near = ((position - position.floor() - 0.5).abs() <= REACH) & (position > grid.low) & (position < grid.high)
    return crowded(int(near.sum()), position.numel())
