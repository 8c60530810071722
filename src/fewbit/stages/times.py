"""What a plan takes on this machine: the table of measured milliseconds of single ops, where the target's runtime and processor
are here, and the ops that lose time in integers by it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from fewbit.choose import Bits, Context, choose
from fewbit.core.graph import Graph
from fewbit.core.plan import Fallback, PassLog, Plan
from fewbit.errors import UnknownName
from fewbit.folder import TWIN, scratch
from fewbit.observe import Stats
from fewbit.progress import Progress
from fewbit.realize import float_onnx
from fewbit.recipes import RECIPES
from fewbit.request import Planned
from fewbit.target import Target, absent, detect, load_target, processor_flags
from fewbit.target.allowed import Allowed
from fewbit.verify.times import Times, times_of, whole_of

PRODUCTS = (("input", "weight"), ("query", "key"), ("probs", "value"), ("left", "right"))  # operands that are multiplied


def context_of(graph: Graph, stats: Stats, request: Planned, **more: Any) -> Context:
    """What passes may read, by a request."""
    bits = request.widths
    return Context(
        graph, stats, request.hardware, bits if isinstance(bits, Bits) else Bits(), keep_float=tuple(request.keep_float),
        float_by_limit=request.float_by_limit, everything=request.everything, name=request.recipe_name, seed=request.seed,
        **more,
    )  # fmt: skip


def elsewhere(graph: Graph, plan: Plan, target: Target) -> tuple[Fallback, ...]:
    """Fallbacks where the target's runtime or processor is not available here, with what that may do to the codes of a plan."""
    if target.runtime != target.runs_in:
        why = f"{target.runtime} cannot run here: {target.runs_in} computed the file as written, for codes and accuracy"
        why += _saturation(graph, plan, target)
        return (Fallback("the runtime", target.runtime, target.runs_in, why, 1.0, "runtime"),)
    if not target.fits(platform.machine(), processor_flags()):
        why = f"{target.runs_in} computed the file in the kernels of another processor, for codes and accuracy"
        why += _saturation(graph, plan, target)
        return (Fallback("this machine", target.processor, "another processor", why, 1.0, "machine"),)
    return ()


def _saturation(graph: Graph, plan: Plan, target: Target) -> str:
    """That sums of two products of a plan may saturate in this machine's kernels, where the target for them says so."""
    try:
        here = load_target(detect(target.runs_in, platform.machine(), processor_flags()))
    except UnknownName:
        return "; how they add products is not known, as no target of fewbit is for them"
    widths = {rule.kind: rule.accumulator.pair_bits for rule in here.op}
    smallest = min((bits for bits in widths.values() if bits), default=None)
    for op in graph.ops:
        bits = widths.get(op.kind, smallest)
        for pair in PRODUCTS if bits and op.name in plan.integer_ops else ():
            first, second = (plan.choices.get(op.operands.get(operand, "")) for operand in pair)
            if first is None or second is None:
                continue
            if max(first.grid.bits, first.grid.stored, second.grid.bits, second.grid.stored) > 8:  # multiplied in float
                continue
            unsigned = first.grid.high + 128 * first.grid.signed  # what x86 multiplies: 8-bit codes without sign by such with
            if bits and 2 * unsigned * second.grid.largest >= 2 ** (bits - 1):
                return f"; they add two products in {bits} bits, which those of {op.name} may saturate"
    return ""


def times_here(
    context: Context, plan: Plan, threads: int, folder: Path, progress: Progress, twin: Path | None = None, **options: Any
) -> Times | None:  # fmt: skip
    """The times of this machine for what a plan has in integers; None where they are not the target's.

    `twin` is the float model as a file; without one it is written in `folder` for as long as it is measured. `options` are
    those of `verify.latency.table`.
    """
    graph, target = context.graph, context.target
    if absent(target) or not plan.integer_ops:
        return None
    progress.begin("milliseconds of each op", None)
    with scratch(folder) as own:
        path = twin or Path(own) / TWIN
        if twin is None:
            float_onnx(graph, path, opset=target.opset)
        whole = whole_of(graph, target.runtime, path, threads)
    given = graph, target, plan, _allowing(context)
    return times_of(*given, whole, threads, progress=lambda text: progress.advance(1, text), **options)


def without_slower(
    context: Context, threads: int, folder: Path, progress: Progress, **options: Any
) -> tuple[Context, PassLog]:  # fmt: skip
    """The context in which every op that makes the model slower in integers, by the table of this machine, stays float; and the
    milliseconds of those ops.
    """
    plan = choose(context, RECIPES["minmax"])  # whose ops are those of any recipe
    times = times_here(context, plan, threads, folder, progress, **options)
    ops = [] if times is None else times.slower()
    why = f"no faster in integers on this machine, with what quantizes around it ({context.target.runtime}, threads: {threads})"
    rows = [
        {"op": op, **dict(zip(("float_ms", "integer_ms"), times.table[times.work[op]], strict=True))} for op in ops if times
    ]
    log = PassLog("only what pays", f"{context.target.runtime}, threads: {threads}", tuple(rows))
    return replace(context, slower=dict.fromkeys(ops, why)), log


def _allowing(context: Context) -> Callable[[tuple[str, ...]], Allowed]:
    """What runs in integers with some more ops in float."""

    @cache
    def allow(floats: tuple[str, ...]) -> Allowed:
        bits = replace(context.bits, floats=(*context.bits.floats, *floats))
        return replace(context, bits=bits).allowed

    return allow
