"""Verify: the artefact in the real runtime. Codes first, then accuracy, then time."""

from fewbit.runtimes import Session, open_session, runtime_names, runtimes_for, timed
from fewbit.verify.bench import Latency, Load, bench, loads
from fewbit.verify.compare import compare
from fewbit.verify.evaluate import Score, evaluate

__all__ = [
    "Latency",
    "Load",
    "Score",
    "Session",
    "bench",
    "compare",
    "evaluate",
    "loads",
    "open_session",
    "runtime_names",
    "runtimes_for",
    "timed",
]
