"""What the runtime leaves in float of the ops that the plan has in integers, by the rules of lint on the file, and what the
page says of its kernels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fewbit.core.checks import Checks
from fewbit.core.graph import Graph
from fewbit.core.plan import Fallback, Plan
from fewbit.lint.lint import RULES, Lint, lint
from fewbit.lint.truth import RAN
from fewbit.report.answers import ELSEWHERE
from fewbit.report.tables import integer_share
from fewbit.runtimes import RUNTIMES
from fewbit.target import Target

EXACT = 1e-6  # shares that differ by less are the same


def linted(file: Path, target: Target) -> Lint | None:
    """What lint says of a file on a target; None where it has no rules."""
    return lint(file, target) if target.runtime in RULES else None


def as_run(graph: Graph, plan: Plan, found: Lint | None, target: Target) -> Plan:
    """The plan with a fallback for each op of the file that reads codes and yet runs in float in the target's runtime; the same
    plan for a runtime whose rules have not been held against it. `tables.integer_share` leaves them out.
    """
    if found is None or target.runtime not in RAN or integer_share(graph, plan) - found.integer_share < EXACT:
        return plan
    lost = (row for row in found.worst() if row.reads_codes and row.macs > row.integer_macs == 0)
    rows = [Fallback(row.name, "an integer kernel", "float", row.rule, row.share, kind="kernels") for row in lost]
    return replace(plan, fallbacks=(*plan.fallbacks, *rows))


def fused(plan: Plan, checks: Checks, found: Lint | None, target: Target) -> dict[str, Any]:
    """Tables of tables.json: `kernels`, the integer kernels in the optimised graph of the target's own runtime, where that can
    show it and is here, on the target's processor; else `by_rules`, the nodes of the file that run in integers by lint's rules
    for it. Neither where there are no rules.
    """
    here = not any(one.kind in ELSEWHERE for one in plan.fallbacks)
    if here and RUNTIMES[target.runtime].kernels:
        return {"kernels": checks.kernels}
    if found is None:
        return {"kernels": {}}
    held = "held against what it runs" if target.runtime in RAN else "which nobody has held against it"
    return {
        "kernels": {},
        "by_rules": [
            {
                "integer": sum(row.integer for row in found.rows),
                "nodes": len(found.rows),
                "expected": len(plan.integer_ops),
                "rules": f"those of fewbit lint for {target.runtime}, {held}",
            }
        ],
    }
