"""Seen: how model.onnx does on images that it was fitted to. What is better there than on others, more images can bring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.core.graph import Graph
from fewbit.core.plan import Plan
from fewbit.data.images import Images
from fewbit.errors import BadImages, BadValues, CannotRun
from fewbit.progress import Progress
from fewbit.request import Request
from fewbit.stages.evaluate import evaluate
from fewbit.stages.observe import spread
from fewbit.verify import Score
from fewbit.workers import Workers

FEWEST, MOST = 16, 256  # images that are looked at
BITS = 8  # of weights, from which on little is left to learn by heart
SOLVERS = ("gptq", "reconstruct", "finetune", "distill")  # passes that take the codes of weights from images


def is_fitted(plan: Plan) -> bool:
    """Whether codes of fewer than 8 bits were solved from images."""
    few = any(choice.grid.bits < BITS for choice in plan.choices.values() if choice.role == "weight")
    return few and any(row.name in SOLVERS for row in plan.log)


def seen(
    exact: Graph, plan: Plan, model: Path, twin: Path, trusted: object, calibration: Images, score: Score, request: Request,
    runtime: str, threads: int, progress: Progress, workers: Workers,
) -> Mapping[str, Any] | None:  # fmt: skip
    """The agreement on calibration images, evenly spread, beside that on the scored ones, in percent, and how far apart the two
    can be by chance (95 %, as if of independent answers); None where codes were not fitted to images, or where these are
    few, made from the model, or all alike.
    """
    if request.synthetic[0] or len(calibration) < FEWEST or not is_fitted(plan):
        return None
    some = spread(calibration, MOST, exact.at_a_time(1))
    try:
        known = evaluate(exact, model, twin, trusted, some, runtime, threads, progress, workers, drawn=False)
    except (BadImages, BadValues, CannotRun):
        return None
    found = [(one.rating.agreement, one.images) for one in (known, score)]
    chance = 1.96 * math.sqrt(sum(a * (100 - a) / n for a, n in found))
    return {"images": known.images, "agreement": found[0][0], "others": found[1][0], "chance": chance}
