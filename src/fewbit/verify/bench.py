"""Latency, float beside integer: runs alternate in pairs, so that a slow moment hits both.

Also load time, and peak memory of a fresh process for each file.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from fewbit.core.inputs import Input, arrays_of, example, image_among
from fewbit.core.peak import peak
from fewbit.errors import BadFile, UnknownName
from fewbit.runtimes import RUNNABLE, RUNTIMES, open_session, runtime_names

# What a fresh process does: import the runtime and nothing of fewbit, whose torch takes more memory than most models; load a
# file, run an image of zeros.
CHILD = """
import io, json, sys, time
import numpy as np
{imports}
path, threads = sys.argv[1:]
seconds, threads = 0.0, int(threads)
if path:
    inputs = dict(np.load(io.BytesIO(sys.stdin.buffer.read())))
    start = time.perf_counter()
    exec({load!r})
    seconds = time.perf_counter() - start
    run(inputs)
{peak}
print(json.dumps([seconds, peak()]))
"""


@dataclass(frozen=True)
class Latency:
    """Medians in milliseconds of one call; `ratio` is the median of the pairwise ratios float / quantized.

    The spreads are those of the middle half of the calls, `load` is how many processes the machine was running meanwhile
    (with those that measured). `best` is the session in which the same runtime has its fastest float model, and `over_best`
    the median ratio of that one and this file in the same rounds, with its 95 % interval: (low, median, high).
    """

    runtime: str
    batch: int
    threads: int
    float_ms: float
    quantized_ms: float
    ratio: float
    runs: int
    float_spread: tuple[float, float]
    quantized_spread: tuple[float, float]
    load: float
    best: str
    over_best: tuple[float, float, float]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Load:
    """Medians of `runs` fresh processes: seconds to make a session, and bytes at the peak of loading and running one image.

    `baseline_bytes` is the peak of a process that imports the runtime and loads nothing.
    """

    runtime: str
    threads: int
    float_seconds: float
    quantized_seconds: float
    float_bytes: int
    quantized_bytes: int
    baseline_bytes: int
    runs: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def bench(
    float_path: Path,
    path: Path,
    inputs: Sequence[Input],
    *,
    runtimes: Sequence[str],
    batches: Sequence[int] = (1, 8),
    threads: int = 2,
    seconds: float = 4.0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Latency]:
    """One row per runtime and batch; about `seconds` of measuring each, at least 5 rounds, after a warm-up. Sessions of one
    runtime (its precisions) are measured in the same rounds.
    """
    rows, shape = [], image_among(inputs).shape
    for group in _of_one_runtime(runtimes):
        sessions = [open_session(name, p, threads=threads) for name in group for p in (float_path, path)]
        for batch in batches:
            for name in group:
                progress(f"{name}, batch {batch}")
            noise = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
            arrays = arrays_of(inputs, example(inputs, noise))
            calls = [partial(session.call, session.feed(*arrays)) for session in sessions]
            rows += _rows(group, batch, threads, np.array(paired(calls, seconds * len(group))))
    return rows


def _of_one_runtime(names: Sequence[str]) -> list[list[str]]:
    """The names of sessions, those of one runtime together."""
    owner = {name: runtime.name for runtime in RUNTIMES.values() for name in (runtime.name, *runtime.variants)}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(owner.get(name, name), []).append(name)
    return list(groups.values())


def _rows(group: Sequence[str], batch: int, threads: int, times: NDArray[np.float64]) -> list[Latency]:
    """The rows of sessions of one runtime; `times` are seconds (rounds, sessions times float and quantized)."""
    floats, files, rows = times[:, ::2], times[:, 1::2], []
    fastest = int(np.median(floats, axis=0).argmin())
    for k, name in enumerate(group):
        both = np.stack((floats[:, k], files[:, k]), axis=1)
        (low, low8), (first, second), (high, high8) = (1e3 * np.percentile(both, [25, 50, 75], axis=0)).tolist()
        ratio = float(np.median(both[:, 0] / both[:, 1]))
        spread = (low, high), (low8, high8), os.getloadavg()[0]
        over = around_median(floats[:, fastest] / files[:, k])
        rows.append(Latency(name, batch, threads, first, second, ratio, len(times), *spread, group[fastest], over))
    return rows


def around_median(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """(low, median, high): the ends of its 95 % interval are two of the sorted values, the first and the last of few."""
    found = sorted(map(float, values))
    skipped = max(int((len(found) - 1 - 1.96 * math.sqrt(len(found))) / 2), 0)
    return found[skipped], statistics.median(found), found[-1 - skipped]


def paired(
    calls: Sequence[Callable[[], object]], seconds: float, least: int = 5, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, ...]]:
    """Seconds of each call by a clock, round by round: at least `least` rounds, and for `seconds`, after three warm-up rounds.

    The order rotates, as the call after the model with the largest weights finds the caches cold.
    """
    rounds: list[tuple[float, ...]] = []
    warm, end, first = 3, None, 0
    while end is None or len(rounds) < least or time.perf_counter() < end:
        row = [0.0] * len(calls)
        for k in range(len(calls)):
            i = (first + k) % len(calls)
            start = clock()
            calls[i]()
            row[i] = clock() - start
        first += 1
        if warm:
            warm -= 1
        else:
            rounds.append(tuple(row))
            end = end or time.perf_counter() + seconds
    return rounds


def loads(
    float_path: Path,
    path: Path,
    inputs: Sequence[Input],
    *,
    runtimes: Sequence[str],
    batch: int = 1,
    threads: int = 2,
    runs: int = 3,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Load]:
    """One row per runtime; `shape` and `dtype` are those of the images (b, c, h, w). Raises UnknownName for a runtime that is
    not installed, BadFile for a file it cannot load.
    """
    rows = []
    for runtime in runtimes:
        if runtime not in runtime_names():
            raise UnknownName("runtime", runtime, runtime_names())
        progress(runtime)
        rounds = [[_load(runtime, p, inputs, batch, threads) for p in (float_path, path, None)] for _ in range(runs)]
        seconds = [statistics.median(second for second, _ in column) for column in zip(*rounds, strict=True)]
        peaks = [int(statistics.median(held for _, held in column)) for column in zip(*rounds, strict=True)]
        rows.append(Load(runtime, threads, seconds[0], seconds[1], peaks[0], peaks[1], peaks[2], runs))
    return rows


def _load(runtime: str, path: Path | None, inputs: Sequence[Input], batch: int, threads: int) -> tuple[float, int]:
    """Seconds and peak bytes of a process that loads a file, or only imports the runtime."""
    session = RUNNABLE[runtime].session
    assert session is not None
    imports, load = session.script
    child = CHILD.format(imports=imports, load=load, peak=inspect.getsource(peak))
    arrays = io.BytesIO()
    np.savez(arrays, **({} if path is None else _zeros(path, inputs, batch)))  # type: ignore[arg-type]
    command = [sys.executable, "-P", "-c", child, "" if path is None else str(path), str(threads)]
    process = subprocess.run(command, input=arrays.getvalue(), capture_output=True, check=False)
    if process.returncode:
        why = (process.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {process.returncode}"])[-1]
        raise BadFile(f"{runtime} cannot load {path}: {why}")
    seconds, held = json.loads(process.stdout.splitlines()[-1])
    return seconds, held


def _zeros(path: Path, inputs: Sequence[Input], batch: int) -> dict[str, NDArray[Any]]:
    """Images of zeros and the values of the other inputs, as a file takes them by name."""
    arrays = arrays_of(inputs, example(inputs, torch.zeros(batch, *image_among(inputs).shape)))
    try:
        ports = onnx.load(str(path), load_external_data=False).graph.input
    except Exception:  # the process says what is wrong with it
        return {}
    types = [onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type) for port in ports]
    planes = [
        np.moveaxis(x, -3, -1) if dtype == np.uint8 and x.dtype.kind == "f" else x
        for x, dtype in zip(arrays, types, strict=True)
    ]
    return {port.name: x.astype(dtype, "C") for port, x, dtype in zip(ports, planes, types, strict=True)}
