"""Mixed precision: a width for every module under a budget of bytes (Liu et al. 2021, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fewbit.capture.structure import Module, modules
from fewbit.choose.context import Context
from fewbit.choose.frontier import Frontier, frontier
from fewbit.choose.ranges import Ranges
from fewbit.choose.recipe import Recipe
from fewbit.choose.sensitivity import Sensitivity
from fewbit.core.bits import Bits, Mixed
from fewbit.core.graph import Graph
from fewbit.core.plan import Fallback, Json, PassLog
from fewbit.errors import FewbitError
from fewbit.target.allowed import widest
from fewbit.target.spec import Target

KEPT = 2000  # points of the frontier that a plan stores


@dataclass(frozen=True)
class Allocation:
    """The widths, the log of the search, and the candidates that the target has no integers for."""

    bits: Bits
    log: PassLog
    fallbacks: tuple[Fallback, ...]


def allocate(context: Context, mixed: Mixed, recipe: Recipe) -> Allocation:
    """The widths with the smallest sum of losses whose weights take no more bytes than `mixed.mean` bits each.

    Modules are attention, MLPs, and every other op by itself; their losses are those of `recipe.sensitivity` on some
    calibration images, with the recipe's ranges and nearest codes. Raises FewbitError where no candidate fits the target or
    the budget.
    """
    graph, target, integer = context.graph, context.target, set(context.allowed.integer_ops)
    units = [replace(u, ops=members) for u in modules(graph) if (members := tuple(op for op in u.ops if op in integer))]
    options = {u.name: [b for b in mixed.candidates if b <= _widest(graph, target, u)] for u in units}
    fallbacks = [_fallback(context, mixed, u, options[u.name]) for u in units if len(options[u.name]) < len(mixed.candidates)]
    all_widths = sorted({b for widths in options.values() for b in widths})
    ranges = ranges_of(recipe)
    uniform = {b: replace(context, bits=Bits(b, b), progress=lambda site: None) for b in all_widths}
    plans = {b: ranges(one.start(), one) for b, one in uniform.items()}
    count = recipe.sensitivity.images
    scores = recipe.sensitivity(graph, units, plans, context.batched(count, count), context.progress)
    weights = [_weights(graph, module) for module in units]
    points = frontier(
        [[n * b for b in options[s.module.name]] for n, s in zip(weights, scores, strict=True)],
        [[s.losses[b] for b in options[s.module.name]] for s in scores],
    )
    budget = math.floor(sum(weights) * mixed.mean)
    place = points.best(budget)
    module_bits = {u.name: options[u.name][k] for u, k in zip(units, points.picks[place], strict=True)}
    summary = {
        "mean": mixed.mean,
        "budget_bytes": -(-budget // 8),
        "candidates": list(mixed.candidates),
        "uniform": _uniform(scores, weights, all_widths, options),
        "frontier": _points(points, units, options, sum(weights), place),
        "frontier_points": len(points.sizes),
    }
    rows = tuple(_row(s, n, module_bits[s.module.name]) for s, n in zip(scores, weights, strict=True))
    ops, middle = {op: module_bits[u.name] for u in units for op in u.ops}, round(mixed.mean)
    log = PassLog.of("mixed precision", recipe.sensitivity, rows, summary)
    return Allocation(Bits(middle, middle, ops, asked=str(mixed)), log, tuple(fallbacks))


def ranges_of(recipe: Recipe) -> Ranges:
    """The ranges that a recipe begins with."""
    first = recipe.passes[0] if recipe.passes else None
    start = getattr(first, "start", first)
    if not isinstance(start, Ranges):
        raise FewbitError("--bits mixed: needs a recipe that begins with ranges.")
    return start


def _fallback(context: Context, mixed: Mixed, module: Module, allowed: Sequence[int]) -> Fallback:
    """The fallback for candidates that are too wide for a module. Raises FewbitError where none is left."""
    graph, target = context.graph, context.target
    widest_bits = _widest(graph, target, module)
    if not allowed:
        raise FewbitError(
            f"--bits {mixed}: {target.name} has no integers wider than {widest_bits} bits for {module.name}; give narrower "
            "candidates, as in --bits mixed:6.0:4,5,6,7,8."
        )
    requested = f"{', '.join(str(b) for b in mixed.candidates if b not in allowed)} bits as candidates"
    why = f"{target.name} has no integers wider than {widest_bits} bits"
    return Fallback(module.name, requested, f"at most {allowed[-1]}", why, _share(graph, module))


def _widest(graph: Graph, target: Target, module: Module) -> int:
    return min(widest(target, graph.op(op).kind) for op in module.ops)


def _share(graph: Graph, module: Module) -> float:
    return graph.share(sum(graph.op(op).macs for op in module.ops))


def _weights(graph: Graph, module: Module) -> int:
    sites = {graph.op(op).operands["weight"] for op in module.ops if "weight" in graph.op(op).operands}
    return sum(math.prod(graph.site(site).shape) for site in sites)


def _row(s: Sensitivity, weights: int, bits: int) -> dict[str, Json]:
    return {
        "module": s.module.name,
        "kind": s.module.kind,
        "bits": bits,
        "weights": weights,
        "nuclear": s.nuclear,
        "losses": {str(b): loss for b, loss in s.losses.items()},
    }


def _uniform(
    scores: Sequence[Sensitivity], weights: Sequence[int], all_widths: Sequence[int], options: dict[str, list[int]]
) -> list[dict[str, Json]]:
    """The points where all modules have one width, for comparison."""
    everywhere = [b for b in all_widths if all(b in widths for widths in options.values())]
    return [{"bits": b, "bytes": -(-sum(weights) * b // 8), "loss": math.fsum(s.losses[b] for s in scores)} for b in everywhere]


def _points(
    points: Frontier, units: Sequence[Module], options: dict[str, list[int]], weights: int, place: int
) -> list[dict[str, Json]]:
    """The frontier, smallest first; of a very long one every few points, and always the selected one."""
    stride = -(-len(points.sizes) // KEPT)
    rows = []
    for i in sorted({*range(0, len(points.sizes), stride), place, len(points.sizes) - 1}):
        rows.append(
            {
                "bytes": -(-int(points.sizes[i]) // 8),
                "loss": float(points.losses[i]),
                "mean": float(points.sizes[i] / weights),
                "bits": [options[u.name][k] for u, k in zip(units, points.picks[i], strict=True)],
                "taken": i == place,
            }
        )
    return rows
