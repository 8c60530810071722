"""Evaluate: how good model.onnx is beside float.onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit import verify as proofs
from fewbit.core.graph import Graph
from fewbit.data.images import Images
from fewbit.progress import Progress
from fewbit.request.types import Threads, checked
from fewbit.task import task_of
from fewbit.verify import Score
from fewbit.workers import Workers


def evaluate(
    exact: Graph, model: Path, twin: Path, trusted: object, scored: Images, runtime: str, threads: int, progress: Progress,
    workers: Workers, drawn: bool,
) -> Score:  # fmt: skip
    """How good model.onnx is beside float.onnx, which was looked at, in the runtime, on images not used for calibration.

    Predictions on the images that differ most are `drawn` where a page will show them: not in a quick run, nor where nothing
    but the numbers is asked for.
    """
    threads = checked("threads", threads, Threads)
    progress.expect(len(scored))
    return proofs.evaluate(
        twin,
        model,
        scored,
        exact.outputs,
        task_of(exact),
        **options_of(exact, runtime, threads),
        progress=progress.advance,
        workers=workers,
        drawn=drawn,
    )


def options_of(exact: Graph, runtime: str, threads: int) -> dict[str, Any]:
    """How the files of a graph are evaluated."""
    return {
        "inputs": exact.inputs, "inside": exact.inside, "behind": exact.behind, "turned": exact.turned, "runtime": runtime,
        "batch": exact.in_a_file(16), "threads": threads,
    }  # fmt: skip
