"""Parts of a concatenation whose step is almost that of the whole take the whole's: they need no other codes then.

openvino 2026 leaves such a requantization out of its graph, and its codes would be others than those of the plan.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.choose.builder import PlanBuilder
from fewbit.choose.context import Context
from fewbit.core.device import widest
from fewbit.core.grid import Grid, QParams
from fewbit.core.plan import Choice, Plan, SameAs

NEAR = 1.1  # codes between the ends of two ranges of bytes; openvino leaves a requantization out below one


def with_common_steps(plan: Plan, context: Context) -> Plan:
    """The plan with the step of the whole for each part of a concatenation that is near to it; one that is a part of
    two keeps the step of the first, and the second takes it.
    """
    builder, settled = PlanBuilder(plan, context), set[str]()
    for op in context.graph.ops:
        whole = _own(builder, op.operands["output"]) if op.kind == "concat" else None
        if whole is None:
            continue
        parts = [_own(builder, site) for operand, site in op.operands.items() if operand != "output"]
        near = [part for part in parts if part is not None and is_near(part, whole)]
        first = next((part for part in near if part.site in settled), None)
        if first is not None and whole.site not in settled:
            whole = replace(whole, qparams=first.qparams)
            builder.set(whole)
        for part in near:
            if part.site not in settled:
                builder.set(replace(part, qparams=whole.qparams))
            settled |= {part.site, whole.site}
    return builder.plan() if settled else plan


def is_near(part: Choice, whole: Choice) -> bool:
    """Whether both ends of what a byte holds in a part's step are within about a code of those in the whole's step."""
    if part.site == whole.site or part.grid != whole.grid or part.qparams.scale.ndim or whole.qparams.scale.ndim:
        return False
    return bool((_ends(part.qparams, part.grid) - _ends(whole.qparams, whole.grid)).abs().max() < NEAR * whole.qparams.scale)


def _ends(qparams: QParams, grid: Grid) -> Tensor:
    """The least and the largest number that a byte stands for."""
    byte = (-128, 127) if grid.signed else (0, 255)
    return (torch.tensor(byte, dtype=widest(qparams.zero.device), device=qparams.zero.device) - qparams.zero) * qparams.scale


def _own(builder: PlanBuilder, site: str) -> Choice | None:
    """The choice whose codes a site holds, its own or that of the site that it follows; None where its scale is not free."""
    choice = builder.choices.get(site)
    while choice is not None and isinstance(choice.source, SameAs):
        choice = builder.choices.get(choice.source.site)
    return choice if choice is not None and choice.is_free else None
