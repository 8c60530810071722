"""Latency, float beside integer, in pairs: a run of one, a run of the other, so that a slow moment hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fewbit.verify.runtimes import Session, open_session


@dataclass(frozen=True)
class Latency:
    """Medians in milliseconds of one call; `ratio` is the median of the pairwise ratios float / quantized."""

    runtime: str
    batch: int
    threads: int
    float_ms: float
    quantized_ms: float
    ratio: float
    runs: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def bench(
    float_path: Path,
    path: Path,
    input_shape: tuple[int, int, int],
    *,
    runtimes: Sequence[str],
    batches: Sequence[int] = (1, 8),
    threads: int = 2,
    seconds: float = 4.0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Latency]:
    """One row per runtime and batch; about `seconds` of measuring each, at least 5 pairs, after a warm-up."""
    rows = []
    for runtime in runtimes:
        sessions = [open_session(runtime, p, threads=threads) for p in (float_path, path)]
        for batch in batches:
            progress(f"{runtime}, batch {batch}")
            x = np.random.default_rng(0).standard_normal((batch, *input_shape)).astype(np.float32)
            times = paired(sessions, x, seconds)
            first, second = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(a / b for a, b in times)
            rows.append(Latency(runtime, batch, threads, 1e3 * first, 1e3 * second, ratio, len(times)))
    return rows


def paired(sessions: Sequence[Session], x: np.ndarray, seconds: float) -> list[tuple[float, ...]]:
    """Seconds of one call of each session, round by round, until the time is up; the first three rounds warm up.

    The order rotates: who runs behind the model with the largest weights finds the caches cold.
    """
    rounds: list[tuple[float, ...]] = []
    warm, end, first = 3, None, 0
    while end is None or len(rounds) < 5 or time.perf_counter() < end:
        row = [0.0] * len(sessions)
        for k in range(len(sessions)):
            i = (first + k) % len(sessions)
            start = time.perf_counter()
            sessions[i].run(x)
            row[i] = time.perf_counter() - start
        first += 1
        if warm:
            warm -= 1
        else:
            rounds.append(tuple(row))
            end = end or time.perf_counter() + seconds
    return rounds
