"""Verify: the artefact in the real runtime. Codes first, then accuracy, then time.

Codes
    compare       codes of the simulation against those of the runtime, site by site
    ties          which codes may differ, by float32
    selections    what a runtime selects where scores are nearly equal
    thresholds    and what it finds true where numbers stand on a threshold
    outputs       last outputs against the executor's, and the float twin's against the model's
    tail          the outputs behind a tail
    file          the numbers in a file against the plan
Accuracy
    evaluate      how good the file is, beside its float twin
    attention     attention maps, float beside quantized
Time
    bench         latency, load time and memory, float beside integer
    latency       milliseconds of single ops, measured and cached
    times         the milliseconds of a plan, predicted from those
    postprocess   what stays float behind the last layers, and what it costs
"""

from fewbit.runtimes import Session, open_session, runtime_names, runtimes_for, timed
from fewbit.verify.bench import Latency, Load, bench, loads
from fewbit.verify.compare import compare
from fewbit.verify.evaluate import Score, evaluate, refuse_silent
from fewbit.verify.file import deviations
from fewbit.verify.outputs import twin_checks
from fewbit.verify.tail import other_rows, tail_checks

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
    "other_rows",
    "refuse_silent",
    "runtime_names",
    "runtimes_for",
    "tail_checks",
    "timed",
    "twin_checks",
]
