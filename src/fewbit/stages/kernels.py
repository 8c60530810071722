"""What the runtime leaves in float of the ops that the plan has in integers, by the rules of lint on the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewbit.core.graph import Graph
from fewbit.core.plan import Fallback, Plan
from fewbit.lint.lint import lint
from fewbit.lint.truth import RAN
from fewbit.report.tables import integer_share
from fewbit.target import Target

EXACT = 1e-6  # shares that differ by less are the same


def as_run(graph: Graph, plan: Plan, file: Path, target: Target) -> Plan:
    """The plan with a fallback for each op of `file` that reads codes and yet runs in float in the target's runtime; the same
    plan for a runtime whose rules have not been held against it. `tables.integer_share` leaves them out.
    """
    if target.runtime not in RAN:
        return plan
    found = lint(file, target)
    if integer_share(graph, plan) - found.integer_share < EXACT:
        return plan
    lost = (row for row in found.worst() if row.reads_codes and row.macs > row.integer_macs == 0)
    rows = [Fallback(row.name, "an integer kernel", "float", row.rule, row.share, kind="kernels") for row in lost]
    return replace(plan, fallbacks=(*plan.fallbacks, *rows))
