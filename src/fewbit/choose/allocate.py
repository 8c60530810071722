"""Mixed precision: a width for every module under a budget of bytes (Liu et al. 2021, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from fewbit.capture.units import Unit, units
from fewbit.choose.choose import choose
from fewbit.choose.frontier import Frontier, frontier
from fewbit.choose.recipe import Recipe
from fewbit.choose.sensitivity import Sensitivity
from fewbit.core.bits import Bits, Mixed
from fewbit.core.values import Fallback, Graph, Json
from fewbit.errors import FewbitError
from fewbit.execute.samples import ChannelSample
from fewbit.observe.stats import Stats
from fewbit.target.allowed import allowed, widest
from fewbit.target.spec import Target

KEPT = 2000  # points of the frontier that a plan keeps


@dataclass(frozen=True)
class Allocation:
    """The widths, what a plan keeps of how they were found (JSON), and the candidates that the target has no integers for."""

    bits: Bits
    record: Json
    fallbacks: tuple[Fallback, ...]


def allocate(
    graph: Graph,
    stats: Stats,
    target: Target,
    recipe: Recipe,
    mixed: Mixed,
    batch: Tensor,
    *,
    keep_float: Sequence[str] = (),
    everything: bool = False,
    progress: Callable[[str], None] = lambda unit: None,
    channels: Mapping[str, ChannelSample] = MappingProxyType({}),
) -> Allocation:
    """The widths with the smallest sum of losses whose weights take no more bytes than `mixed.mean` bits each.

    Units are attention modules, MLPs, and every other op by itself; their losses are those of `recipe.sensitivity` on a batch
    of calibration images, with the recipe's ranges and rounding but without its search. Raises FewbitError where no candidate
    fits the target or the budget.
    """
    integer = set(allowed(graph, target, keep_float=keep_float, everything=everything).integer_ops)
    found = [replace(u, ops=kept) for u in units(graph) if (kept := tuple(op for op in u.ops if op in integer))]
    options = {u.name: [b for b in mixed.candidates if b <= _widest(graph, target, u)] for u in found}
    fallbacks = []
    for unit in found:
        if not options[unit.name]:
            raise FewbitError(
                f"--bits {mixed}: {target.name} has no integers wider than {_widest(graph, target, unit)} bits for "
                f"{unit.name}; give narrower candidates, as in --bits mixed:6.0:4,5,6,7,8."
            )
        if len(options[unit.name]) < len(mixed.candidates):
            asked = f"{', '.join(str(b) for b in mixed.candidates if b not in options[unit.name])} bits as candidates"
            why = f"{target.name} has no integers wider than {_widest(graph, target, unit)} bits"
            fallbacks.append(Fallback(unit.name, asked, f"at most {options[unit.name][-1]}", why, _share(graph, unit)))
    tried = sorted({b for widths in options.values() for b in widths})
    plain = replace(recipe, search=None, correction=None, then=None, joint=None, tune=None, rebuild=None)
    plans = {
        b: choose(graph, stats, target, plain, bits=Bits(b, b), keep_float=keep_float, everything=everything, channels=channels)
        for b in tried
    }
    measured = recipe.sensitivity(graph, found, plans, batch, progress)
    weights = [_weights(graph, unit) for unit in found]
    points = frontier(
        [[n * b for b in options[s.unit.name]] for n, s in zip(weights, measured, strict=True)],
        [[s.losses[b] for b in options[s.unit.name]] for s in measured],
    )
    budget = math.floor(sum(weights) * mixed.mean)
    place = points.best(budget)
    chosen = {u.name: options[u.name][k] for u, k in zip(found, points.picks[place], strict=True)}
    ops = {op: chosen[u.name] for u in found for op in u.ops}
    record = {
        "mean": mixed.mean,
        "sensitivity": repr(recipe.sensitivity),
        "budget_bytes": -(-budget // 8),
        "candidates": list(mixed.candidates),
        "units": [_row(s, n, chosen[s.unit.name]) for s, n in zip(measured, weights, strict=True)],
        "uniform": _uniform(measured, weights, tried, options),
        "frontier": _points(points, found, options, sum(weights), place),
        "frontier_points": len(points.sizes),
    }
    middle = round(mixed.mean)
    return Allocation(Bits(middle, middle, ops, asked=str(mixed)), record, tuple(fallbacks))


def _widest(graph: Graph, target: Target, unit: Unit) -> int:
    return min(widest(target, graph.op(op).kind) for op in unit.ops)


def _share(graph: Graph, unit: Unit) -> float:
    return sum(graph.op(op).macs for op in unit.ops) / max(graph.macs, 1)


def _weights(graph: Graph, unit: Unit) -> int:
    sites = {graph.op(op).operands["weight"] for op in unit.ops if "weight" in graph.op(op).operands}
    return sum(math.prod(graph.site(site).shape) for site in sites)


def _row(s: Sensitivity, weights: int, bits: int) -> dict[str, Json]:
    return {
        "unit": s.unit.name,
        "kind": s.unit.kind,
        "bits": bits,
        "weights": weights,
        "nuclear": s.nuclear,
        "losses": {str(b): loss for b, loss in s.losses.items()},
    }


def _uniform(
    measured: Sequence[Sensitivity], weights: Sequence[int], tried: Sequence[int], options: dict[str, list[int]]
) -> list[dict[str, Json]]:
    """The points where all units have one width, for comparison."""
    everywhere = [b for b in tried if all(b in widths for widths in options.values())]
    return [
        {"bits": b, "bytes": -(-sum(weights) * b // 8), "loss": math.fsum(s.losses[b] for s in measured)} for b in everywhere
    ]


def _points(
    points: Frontier, found: Sequence[Unit], options: dict[str, list[int]], weights: int, place: int
) -> list[dict[str, Json]]:
    """The frontier, smallest first; of a very long one every few points, and always the one that was taken."""
    step = -(-len(points.sizes) // KEPT)
    rows = []
    for i in sorted({*range(0, len(points.sizes), step), place, len(points.sizes) - 1}):
        rows.append(
            {
                "bytes": -(-int(points.sizes[i]) // 8),
                "loss": float(points.losses[i]),
                "mean": float(points.sizes[i] / weights),
                "bits": [options[u.name][k] for u, k in zip(found, points.picks[i], strict=True)],
                "taken": i == place,
            }
        )
    return rows
