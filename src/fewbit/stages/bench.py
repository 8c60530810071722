"""Bench: how fast model.onnx and float.onnx are, and how long they take to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewbit import verify as proofs
from fewbit.core.graph import Graph
from fewbit.progress import Progress
from fewbit.request.types import Batches, Seconds, Threads, checked
from fewbit.verify import Latency, Load


def bench(
    exact: Graph, model: Path, twin: Path, threads: int, seconds: float, progress: Progress,
    runtimes: Sequence[str] | None = None, batches: Sequence[int] = (1, 8), repeats: int = 1,
) -> tuple[list[Latency], list[Load]]:  # fmt: skip
    """Latency and load time in the installed runtimes, or in `runtimes`.

    Each runtime and batch is measured for `seconds`; each file is loaded by `repeats` processes. A file with a batch written
    in it is measured with that one, a file with a tail with one image.
    """
    batches, threads = checked("batch", batches, Batches), checked("threads", threads, Threads)
    seconds = checked("seconds", seconds, Seconds)
    batches = [exact.in_a_file(1)] if exact.batch or exact.tail else batches
    timed = list(proofs.timed(model)) if runtimes is None else list(runtimes)
    whole = [name for name in proofs.runtimes_for(model) if runtimes is None or name in timed]
    progress.expect(len(timed) * len(batches) + len(whole))
    shared: dict[str, Any] = {"threads": threads, "progress": lambda text: progress.advance(1, text)}
    times = proofs.bench(twin, model, exact.inputs, runtimes=timed, batches=batches, seconds=seconds, **shared)
    batch = exact.at_a_time(1)
    return times, proofs.loads(twin, model, exact.inputs, runtimes=whole, batch=batch, runs=repeats, **shared)
