"""Verify: the artefact in the real runtime. Codes first, then accuracy, then time."""

from fewbit.runtimes import Session, open_session, runtime_names, runtimes_for, timed
from fewbit.verify.bench import Latency, Load, bench, loads
from fewbit.verify.compare import compare
from fewbit.verify.evaluate import Score, evaluate
from fewbit.verify.file import deviations
from fewbit.verify.outputs import twin_checks
from fewbit.verify.tail import tail_checks

__all__ = [
    "Latency",
    "Load",
    "Score",
    "Session",
    "bench",
    "compare",
    "deviations",
    "evaluate",
    "loads",
    "open_session",
    "runtime_names",
    "runtimes_for",
    "tail_checks",
    "timed",
    "twin_checks",
]
