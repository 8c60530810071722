"""Choose: every pass of a recipe in order."""

from __future__ import annotations

from dataclasses import replace

from fewbit.choose.common_step import with_common_steps
from fewbit.choose.context import Context
from fewbit.choose.headroom import overflowing
from fewbit.choose.off_boundaries import off_boundaries
from fewbit.choose.recipe import Checked, Pass, Recipe
from fewbit.core.device import CPU, on
from fewbit.core.plan import Plan


def choose(context: Context, recipe: Recipe) -> Plan:
    """The plan for a graph on a target: a choice for every site that is read in integers. It is made where the graph lies, and
    itself lies on the processor.

    Raises UnknownName for a pattern in `keep_float` that matches nothing, BadValues where a weight is not finite, BadImages
    where a pass needs images or labels that are not there, FewbitError for a pass that the target has no room for.
    """
    for one_pass in recipe.passes:
        check_pass(one_pass, context)
    plan = context.start(repr(recipe))
    for one_pass in recipe.passes:
        plan = one_pass(plan, context)
    plan = with_common_steps(off_boundaries(plan, context), context)
    fallbacks = (*plan.fallbacks, *overflowing(context.graph, plan, context.allowed))
    return on(replace(plan, fallbacks=fallbacks), CPU)


def check_pass(one_pass: Pass, context: Context) -> None:
    """Let a pass refuse before any work starts: a pass may have a method `check(context)` for that."""
    if isinstance(one_pass, Checked):
        one_pass.check(context)
