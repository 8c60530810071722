"""A row of a table in a process of its own, as a JSON file: how it ended, at which stage, and what was measured.

right      exit code 0: every code, weight and output is what it should be
refused    exit code 2: one line says what is not possible
wrong      exit code 1: something was found wrong
crashed    a traceback, a signal, or no end within the time
"""

from __future__ import annotations

import math
import multiprocessing
import re
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fewbit import Run
from fewbit.errors import FewbitError, FewbitFailed, stopped
from fewbit.files import write_json
from fewbit.report import tables
from fewbit.stages import STAGES

WALL = 5  # seconds on the clock for each second of work, on a machine that does other things
UNTIL = "evaluate"
ENDS = ("right", "refused", "wrong", "crashed")
Found = dict[str, Any]


def made(work: Callable[[Found], Found], about: Mapping[str, Any], file: Path, limit: float, threads: int) -> None:
    """Let `work` add to what is known of a row, in a process forked from this one, for `limit` seconds of work."""
    process = multiprocessing.get_context("fork").Process(target=_tried, args=(work, about, file, limit, threads))
    process.start()
    process.join(WALL * limit)
    if process.is_alive():
        process.kill()
        process.join()
    if not file.exists():
        late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        why = f"no end within {limit:g} s of work" if late else f"the process ended with {process.exitcode}"
        write_json(file, {**about, "end": "crashed", "message": why, "stage": "", "seconds": limit})


def _tried(work: Callable[[Found], Found], about: Mapping[str, Any], file: Path, limit: float, threads: int) -> None:
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit)))
    found: Found = {**about, "stage": "model"}
    start = time.perf_counter()
    try:
        found |= work(found)
    except Exception as error:
        known = stopped(error) or error
        if isinstance(known, FewbitError):
            found |= {"end": "refused", "message": f"{type(known).__name__}: {known}"}
        elif isinstance(known, FewbitFailed):
            found |= {"end": "wrong", "message": str(known)}
        else:
            found |= {"end": "crashed", "message": traceback.format_exc()}
    write_json(file, {**found, "seconds": round(time.perf_counter() - start, 1)})


def verified(run: Run, found: Found) -> Found:
    """What verify and evaluate say of a run; `found["stage"]` is the stage that it is at."""
    for stage in STAGES:
        found["stage"] = stage.name
        run.do(stage.name)
        if stage.name == UNTIL:
            break
    checks, plan, score = tables.verify(run["checks"]), run["plan"], run["score"]
    agreements = [one.agreement for one in score.outputs if one.agreement is not None]
    kernels = run["checks"].kernels
    return {
        **checks,
        "end": "wrong" if checks["problems"] else "right",
        "message": "; ".join(checks["problems"]),
        "share": tables.integer_share(run["graph"], plan),
        "fallbacks": len(plan.fallbacks),
        "kernels": [kernels["found"], kernels["expected"]],
        "correlation": min(agreements) / 100 if agreements else None,
        "outputs_named": [one.name for one in score.outputs],
        "stages": dict(run.progress.seconds),
    }


def ends(found: Iterable[Found]) -> str:
    """How many rows ended in which way."""
    count = Counter(row["end"] for row in found)
    return ", ".join(f"{count[end]} {end}" for end in ENDS)


def told(row: Found) -> str:
    """The last line of what is said of a row, for a cell of a table; files without the folder that they were made in."""
    said = " ".join(row["message"].strip().splitlines()[-1:]).replace("|", "/")
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/\s]+/", "", said)
